"""The files of the web page on which one can try the model."""

from importlib import resources

# The page loads from this server alone, and runs no code in generated texts.
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
  """Returns the contents of one of `PATHS`, and its media type."""
  name, media_type = _FILES[path]
  file = resources.files('t2x.serving') / name
  return file.read_text(encoding='utf-8'), media_type
