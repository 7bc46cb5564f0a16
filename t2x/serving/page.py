"""The files of the page that tries a model."""

from importlib import resources

# Everything comes from this server; nothing is run that stands in a text.
POLICY = "default-src 'none'; connect-src 'self'; script-src 'self'; " + (
  "style-src 'self' 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
  "frame-ancestors 'none'"
)
_FILES = {
  '/': ('page.html', 'text/html'),
  '/page.css': ('page.css', 'text/css'),
  '/page.js': ('page.js', 'text/javascript'),
}
PATHS = tuple(_FILES)


def read(path: str) -> tuple[str, str]:
  """Returns the text of one of `PATHS`, and its media type."""
  name, kind = _FILES[path]
  file = resources.files('t2x.serving') / name
  return file.read_text(encoding='utf-8'), kind
