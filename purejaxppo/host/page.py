"""The template of a self-contained HTML page."""

import base64


def image(name: str, title: str, content: bytes, kind: str = "png") -> str:
    """An embedded HTML image, a PNG or GIF. `title` is HTML."""
    data = base64.b64encode(content).decode()
    return f'<img id="{name}" alt="{title}" src="data:image/{kind};base64,{data}">'


def figure(name: str, title: str, png: bytes, caption: str) -> str:
    """An HTML figure with an embedded image. `title` and `caption` are HTML."""
    return f"<figure>{image(name, title, png)}\n<figcaption>{caption}</figcaption></figure>"


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }}
img {{ max-width: 100%; height: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }}
.facts th, .facts td {{ text-align: left; font-weight: normal; vertical-align: top }}
.facts th {{ color: #666; white-space: nowrap }}
.text td {{ font-family: ui-monospace, monospace; white-space: pre-wrap; text-align: left;
  vertical-align: top; max-width: 24rem; overflow-wrap: break-word }}
.text th {{ text-align: left }}
.scrolling {{ overflow-x: auto }}
figure {{ margin: 0 }}
figcaption, .caption {{ color: #555; font-size: 14px }}
.grid, section figure {{ display: grid; gap: 0 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(var(--column), 100%), 1fr)) }}
.grid {{ --column: 18rem }}
section figure {{ --column: 22rem }}
@media (max-width: 40rem) {{ .facts th {{ white-space: normal }} }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
