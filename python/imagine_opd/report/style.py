"""The look of our HTML pages: light and dark by the reader's setting, from a phone's width to a desk's."""

STYLE = """
:root { color-scheme: light dark; --page: #f4f5f7; --card: #fff; --ink: #1c2026; --soft: #5b6470; --edge: #d3d8df;
  --heat: 235, 120, 0; --fault: #b3121d; --fault-ground: #fdecee; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1d2127; --ink: #e7eaee; --soft: #a3acb8;
  --edge: #363d46; --heat: 200, 84, 0; --fault: #ff9aa2; --fault-ground: #3a1d21; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
header, main { max-width: 1200px; margin: 0 auto; padding: 16px; }
main { display: grid; gap: 16px; grid-template-columns: minmax(0, 1fr); padding-top: 0; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 0 0 8px; }
h3 { font-size: 1rem; margin: 16px 0 4px; }
header p, section p { margin: 4px 0 8px; }
section { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: 16px; min-width: 0;
  overflow-wrap: anywhere; }
.sides { display: grid; gap: 16px; grid-template-columns: minmax(0, 1fr); }
@media (min-width: 900px) { .sides { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
.soft { color: var(--soft); }
.fault { color: var(--fault); background: var(--fault-ground); border-radius: 6px; padding: 8px; }
dl { display: grid; grid-template-columns: minmax(72px, max-content) minmax(0, 1fr); gap: 2px 16px; margin: 0 0 8px; }
dt { color: var(--soft); overflow-wrap: anywhere; max-width: 40vw; }
dd { margin: 0; white-space: pre-wrap; unicode-bidi: isolate; }
pre { margin: 0; padding: 8px; border: 1px solid var(--edge); border-radius: 6px; background: var(--page);
  white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace; unicode-bidi: isolate; }
.pictures { display: flex; flex-wrap: wrap; gap: 12px; margin: 8px 0; }
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; border: 1px solid var(--edge); }
.exact { image-rendering: pixelated; }
figcaption { color: var(--soft); font-size: 0.85rem; }
figcaption i { display: inline-block; width: 0.8em; height: 0.8em; border: 2px solid; vertical-align: baseline; }
i.box { border-color: #ff00aa; }
i.crop { border-color: #00c8ff; }
.tokens { font: 15px/1.9 ui-monospace, monospace; white-space: pre-wrap; unicode-bidi: isolate; }
.tokens span { background: rgba(var(--heat), calc(var(--kl) * 0.75)); border-radius: 3px; padding: 2px 0;
  border-bottom: 1px solid var(--edge); }
.legend { color: var(--soft); font-size: 0.9rem; }
.legend b { display: inline-block; width: 96px; height: 0.8em; margin: 0 6px; border: 1px solid var(--edge);
  background: linear-gradient(to right, rgba(var(--heat), 0), rgba(var(--heat), 0.75)); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 2px 10px; text-align: right; border-bottom: 1px solid var(--edge); overflow-wrap: normal; }
th:first-child { text-align: left; font-weight: normal; overflow-wrap: anywhere; min-width: 90px; }
thead th { color: var(--soft); font-weight: 600; }
"""
