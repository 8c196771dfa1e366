"""What papers print, beside what their recipes count."""
