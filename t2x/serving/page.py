"""The files of the page that tries a model."""

from importlib import resources

# Everything comes from this server; nothing is run that stands in a text.
POLICY = "default-src 'none'; connect-src 'self'; script-src 'self'; " + (
  "style-src 'self' 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
  "frame-ancestors 'none'"
)
_KINDS = {
  'page.html': 'text/html',
  'page.css': 'text/css',
  'page.js': 'text/javascript',
}


def read(name: str) -> tuple[str, str]:
  """Returns the text of a file, and its media type."""
  file = resources.files('t2x.serving') / name
  return file.read_text(encoding='utf-8'), _KINDS[name]
