"""Pages in a headless Chromium: what it says of them, and what it asks for."""

import json
import pathlib
import shutil
import subprocess
from typing import NamedTuple

import pytest

BROWSER = next(
  filter(None, map(shutil.which, ('chromium', 'google-chrome'))), None
)

needs_browser = pytest.mark.skipif(
  BROWSER is None, reason='needs chromium or google-chrome on the path'
)


class Opened(NamedTuple):
  """A page that was opened.

  Attributes:
    dom: its HTML, after all scripts.
    console: what was said of it there: errors and warnings too.
    requests: URLs that the page asked for over a network; there was none.
  """

  dom: str
  console: list[str]
  requests: list[str]


def open_page(path: pathlib.Path, folder: pathlib.Path) -> Opened:
  """Opens a page of this machine; `folder` is for what the browser writes."""
  log = folder / 'network.json'
  done = subprocess.run(
    [
      *(BROWSER, '--headless', '--no-sandbox', '--disable-gpu'),
      *(f'--user-data-dir={folder / "profile"}', '--no-first-run'),
      *('--disable-background-networking', '--disable-component-update'),
      '--host-resolver-rules=MAP * ~NOTFOUND',
      *('--enable-logging=stderr', '--v=0', f'--log-net-log={log}'),
      *('--dump-dom', path.as_uri()),
    ],
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  )
  lines = done.stderr.splitlines()
  return Opened(
    done.stdout,
    [line for line in lines if 'CONSOLE' in line],
    _requests(json.loads(log.read_text())),
  )


def _requests(log) -> list[str]:
  """Of a page, not of the browser itself, which looks for updates."""
  start = log['constants']['logEventTypes']['URL_REQUEST_START_JOB']
  started = (
    event['params']
    for event in log['events']
    if event['type'] == start and 'url' in event.get('params', {})
  )
  return [
    request['url']
    for request in started
    if request['initiator'] != 'not an origin'
    and not request['url'].startswith(('file:', 'data:'))
  ]
