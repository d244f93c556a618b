"""The template of a self-contained HTML page."""

import base64


def figure(name: str, title: str, png: bytes, caption: str) -> str:
    """An HTML figure with an embedded image. `title` and `caption` are HTML."""
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img id="{name}" alt="{title}" src="data:image/png;base64,{data}">\n'
        f"<figcaption>{caption}</figcaption></figure>"
    )


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
.text td {{ font-family: ui-monospace, monospace; white-space: pre-wrap; text-align: left }}
.text th {{ text-align: left }}
figure {{ margin: 0 }}
figcaption {{ color: #555; font-size: 14px }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
