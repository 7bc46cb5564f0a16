"""The HTML of pages of results: template, style for light and dark, pieces."""

from collections.abc import Sequence
import html

# Series colors after Okabe and Ito's set, told apart under color blindness,
# with lighter tones on dark.
STYLE = """
:root {
  color-scheme: light dark;
  --page: #fafaf8; --card: #ffffff; --ink: #5c6066; --text: #1c1e21;
  --grid: #e6e6e3; --s0: #0072b2; --s1: #d55e00; --s2: #00896a; --s3: #b0568c;
  --s4: #a67c00; --s5: #3d8fc0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #16181b; --card: #1f2226; --ink: #a2a8b0; --text: #e9ebed;
    --grid: #33373d; --s0: #56b4e9; --s1: #f08a3c; --s2: #2fc79b;
    --s3: #e08fc0; --s4: #e3c04a; --s5: #8fa7ff;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem;
  background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, 'Segoe UI', sans-serif;
}
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .75rem; }
.tiles {
  display: grid; gap: .75rem; margin: 0;
  grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr));
}
.tiles div, figure, .wide, blockquote, details {
  background: var(--card); border: 1px solid var(--grid); border-radius: 8px;
}
.tiles div { padding: .6rem .9rem; }
dt { color: var(--ink); font-size: .85rem; }
dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.wide { margin-top: .75rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; white-space: nowrap; }
th, td {
  padding: .45rem .9rem; text-align: right; font-weight: normal;
  font-variant-numeric: tabular-nums;
}
th:first-child { text-align: left; }
thead th { color: var(--ink); font-size: .85rem; }
tbody tr { border-top: 1px solid var(--grid); }
.charts {
  display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr));
}
figure { margin: 0; padding: .75rem .75rem .5rem; }
figcaption { font-weight: 600; font-size: .95rem; }
figure svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; fill: var(--ink); }
.legend {
  display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .85rem;
  color: var(--ink);
}
.legend i {
  display: inline-block; width: 1rem; height: 3px; border-radius: 2px;
  margin-right: .4rem; vertical-align: middle; background: var(--s0);
}
.legend .faint i { opacity: .4; }
.legend .s1 i { background: var(--s1); }
.legend .s2 i { background: var(--s2); }
.legend .s3 i { background: var(--s3); }
.legend .s4 i { background: var(--s4); }
.legend .s5 i { background: var(--s5); }
blockquote {
  margin: 0 0 .75rem; padding: .75rem 1rem; white-space: pre-wrap;
  overflow-wrap: anywhere; color: var(--ink);
}
blockquote b { color: var(--text); }
.versions { margin: 0 0 .75rem; color: var(--ink); font-size: .85rem; }
.versions span { white-space: nowrap; margin-right: .9rem; }
.versions b { color: var(--text); font-weight: 500; }
summary { padding: .6rem .9rem; cursor: pointer; }
pre { margin: 0; padding: 0 .9rem .9rem; overflow-x: auto; font-size: .85rem; }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def section(title: str, body: str) -> str:
  """Returns a section under a heading; '' if there is nothing in it."""
  return f'<section><h2>{title}</h2>\n{body}</section>' if body else ''


def tiles(figures: Sequence[tuple[str, str]]) -> str:
  """Returns main results, given as (name, value), as tiles."""
  texts = (
    f'<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>'
    for name, value in figures
  )
  return f'<dl class="tiles">{"".join(texts)}</dl>'


def table(head: Sequence[str], body: str) -> str:
  """Returns a table of the HTML of its rows, which may scroll sideways."""
  return (
    f'<div class="wide"><table><thead><tr>{cells("th", head)}</tr></thead>'
    f'<tbody>{body}</tbody></table></div>'
  )


def cells(tag: str, values: Sequence[str]) -> str:
  """Returns the cells of a row, whose texts are escaped."""
  return ''.join(f'<{tag}>{html.escape(value)}</{tag}>' for value in values)


def number(value: float) -> str:
  """Returns a number with four digits, whole from 10,000 to a million."""
  if abs(value) >= 1e6:
    return f'{value:.4g}'
  return f'{value:,.0f}' if abs(value) >= 1e4 else f'{value:.4g}'


def duration(seconds: float) -> str:
  """Returns a time in its two greatest units."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours} h {minutes} min'
  return f'{minutes} min {seconds} s' if minutes else f'{seconds} s'
