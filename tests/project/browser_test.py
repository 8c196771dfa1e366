"""The browser of tests hears what a page says and asks for."""

import browser
import pytest


@pytest.mark.slow
@browser.needs_browser
def test_a_page_that_talks_and_asks(tmp_path):
  page = tmp_path / 'page.html'
  page.write_text(
    '<!doctype html><title>A page</title><p>Text'
    '<link rel="icon" href="data:,"><img src="http://picture.invalid/x.png">'
    "<script>console.error('wrong')</script>"
    "<script>fetch('https://data.invalid/').catch(() => {})</script>"
    '<script>none()</script>'
  )
  opened = browser.open_page(page, tmp_path)
  assert '<p>Text' in opened.dom
  wrong, error = opened.console
  assert '"wrong"' in wrong and 'none is not defined' in error
  assert sorted(opened.requests) == [
    'http://picture.invalid/x.png',
    'https://data.invalid/',
  ]
