"""What routers did: records, tables, plots, the report page."""
