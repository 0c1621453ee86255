"""The pages of reports as jinja2 templates: no script, no link, no font from elsewhere."""

_STYLE = """\
:root { color-scheme: light dark; --paper: #fbfaf7; --card: #ffffff; --ink: #1f2328; --soft: #656b73; --line: #e4e1da;
  --curve: #1c5d99; --level: #b4562a; --mark: #7a6ca8; --good: #3b7d4f; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --card: #1c1f23; --ink: #e3e5e8; --soft: #969da6;
  --line: #31353b; --curve: #7fb2e5; --level: #e39a6f; --mark: #aa9edb; --good: #7cc294; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 20px 72px; }
header { margin-bottom: 28px; }
h1 { font-size: 30px; line-height: 1.2; font-weight: 650; letter-spacing: -0.015em; margin: 0 0 6px; }
h2 { font-size: 19px; font-weight: 620; margin: 44px 0 14px; letter-spacing: -0.005em; }
h3 { font-size: 15px; font-weight: 620; margin: 0; }
p { margin: 0; }
.soft { color: var(--soft); } .small { font-size: 13.5px; }
.tiles { display: grid; grid-template-columns: repeat(3, 1fr); gap: 12px; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 14px 16px; }
.tile b { display: block; font-size: 23px; font-weight: 620; line-height: 1.25; margin: 2px 0;
  letter-spacing: -0.01em; }
.tile b small { font-size: 15px; font-weight: 500; color: var(--soft); letter-spacing: 0; }
.card { padding: 18px 20px; min-width: 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 14px; }
.grid.charts { margin-top: 14px; }
.head { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 2px 16px; align-items: baseline; }
.plot { position: relative; height: 190px; margin: 14px 10px 26px 66px; }
.wide .plot { height: 300px; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot svg * { vector-effect: non-scaling-stroke; fill: none; stroke-linejoin: round; stroke-linecap: round; }
.rule { stroke: var(--line); stroke-width: 1; }
.curve { stroke: var(--curve); stroke-width: 2; } .faint { stroke-width: 1; opacity: 0.35; }
.level { stroke: var(--level); stroke-width: 1.5; stroke-dasharray: 6 5; }
.mark { stroke: var(--mark); stroke-width: 1.5; stroke-dasharray: 2 4; }
.plot span { position: absolute; font-size: 12px; line-height: 1; color: var(--soft); white-space: nowrap; }
.plot .y { right: calc(100% + 9px); transform: translateY(-50%); }
.plot .x { top: calc(100% + 9px); transform: translateX(-50%); }
.plot .m { top: -2px; padding-left: 6px; color: var(--mark); }
.plot .m.flip { transform: translateX(-100%); padding: 0 6px 0 0; }
.plot i { position: absolute; bottom: -3px; width: 6px; height: 6px; margin-left: -3px; border-radius: 50%;
  background: var(--good); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 13px; color: var(--soft); }
.legend u { display: inline-block; width: 22px; margin-right: 7px; vertical-align: middle;
  border-top: 2px solid var(--curve); }
.legend u.level { border-top: 2px dashed var(--level); } .legend u.mark { border-top: 2px dotted var(--mark); }
.legend u.dot { width: 7px; height: 7px; border: 0; border-radius: 50%; background: var(--good); }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 14.5px; }
th, td { padding: 7px 14px 7px 0; text-align: left; vertical-align: baseline; border-top: 1px solid var(--line); }
tr:first-child > * { border-top: 0; }
thead th { color: var(--soft); font-weight: 500; font-size: 13px; }
tbody th { font-weight: 500; } .num { text-align: right; white-space: nowrap; }
td:last-child, th:last-child { padding-right: 0; }
.bar { display: grid; grid-template-columns: minmax(118px, 34%) 1fr 84px; gap: 12px; align-items: center;
  font-size: 14px; padding: 4px 0; }
.bar div { background: var(--line); border-radius: 4px; height: 9px; }
.bar div div { background: var(--curve); min-width: 2px; }
.total { border-top: 1px solid var(--line); margin-top: 6px; padding-top: 8px; display: flex; font-size: 14px;
  font-weight: 620; justify-content: space-between; }
pre, code { font: 12.5px/1.55 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { margin: 0; overflow-x: auto; } code { overflow-wrap: anywhere; }
details > summary { cursor: pointer; font-size: 15px; } details[open] > summary { margin-bottom: 12px; }
ul { margin: 12px 0 0; padding-left: 20px; font-size: 14.5px; }
@media (max-width: 560px) { main { padding: 24px 14px 48px; } h1 { font-size: 25px; } .card { padding: 14px; }
  .tiles { grid-template-columns: 1fr 1fr; } .tile { padding: 11px 12px; } .tile b { font-size: 19px; }
  .plot { margin-left: 58px; } .wide .plot { height: 230px; } .bar { grid-template-columns: 116px 1fr 72px; } }
@media print { body { background: none; } .tile, .card { break-inside: avoid; } }
"""


def head(kind: str, more_style: str = "") -> str:
    """Everything before the body of a page that gets `title`; `more_style` is CSS of one kind of page only."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{{{ title }}}} &ndash; {kind}</title>
<style>
{_STYLE}{more_style}</style>
</head>
"""


PAGE = (
    head("training report")
    + """<body>
{% macro plot(c, wide=false) %}
<figure class="card{{ ' wide' if wide }}" style="margin:0">
<div class="head"><h3>{{ c.title }}</h3><span class="soft small">{{ c.note }}</span></div>
<div class="plot" role="img" aria-label="{{ c.title }} over optimizer steps">
<svg viewBox="0 0 100 100" preserveAspectRatio="none">
{% for t in c.y_ticks %}<line class="rule" x1="0" x2="100" y1="{{ t.place }}" y2="{{ t.place }}"/>{% endfor %}
{% for m in c.marks %}<line class="mark" x1="{{ m.place }}" x2="{{ m.place }}" y1="0" y2="100"/>{% endfor %}
{% for l in c.levels %}<line class="level" x1="0" x2="100" y1="{{ l.place }}" y2="{{ l.place }}"/>{% endfor %}
<polyline class="curve{{ ' faint' if c.smooth }}" data-points="{{ c.n_points }}" points="{{ c.curve }}"/>
{% if c.smooth %}<polyline class="curve" points="{{ c.smooth }}"/>{% endif %}
</svg>
{% for t in c.y_ticks %}<span class="y" style="top:{{ t.place }}%">{{ t.label }}</span>{% endfor %}
{% for t in c.x_ticks %}<span class="x" style="left:{{ t.place }}%">{{ t.label }}</span>{% endfor %}
{% for m in c.marks %}<span class="m{{ ' flip' if m.place > 80 }}" style="left:{{ m.place }}%">{{ m.label }}</span>
{% endfor %}
{% for d in c.dots %}<i style="left:{{ d }}%"></i>{% endfor %}
</div>
<div class="legend">
<span><u></u>measured{{ ', faint; its running mean, bold' if c.smooth }}</span>
{% for l in c.levels %}<span><u class="level"></u>{{ l.label }}</span>{% endfor %}
{% if c.marks %}<span><u class="mark"></u>resumed</span>{% endif %}
{% if c.dots %}<span><u class="dot"></u>checkpoint</span>{% endif %}
</div>
</figure>
{% endmacro %}
{% macro bars(title, rows, total) %}
<div class="card"><h3 style="margin-bottom:10px">{{ title }}</h3>
{% for name, text, percent in rows %}
<div class="bar"><span>{{ name }}</span><div>{% if percent %}<div style="width:{{ percent }}%"></div>{% endif %}</div>
<span class="num">{{ text }}</span></div>
{% endfor %}
<div class="total"><span>{{ total[0] }}</span><span>{{ total[1] }}</span></div></div>
{% endmacro %}
{% macro facts(rows) %}
<div class="card scroll"><table><tbody>
{% for name, value in rows %}<tr><th>{{ name }}</th><td><code>{{ value }}</code></td></tr>{% endfor %}
</tbody></table></div>
{% endmacro %}
<main>
<header><h1>{{ title }}</h1><p class="soft">{{ subtitle }}</p></header>
<section class="tiles">
{% for name, (value, unit), under in tiles %}
<div class="tile"><span class="soft small">{{ name }}</span><b>{{ value }} <small>{{ unit }}</small></b>
<span class="soft small">{{ under }}</span></div>
{% endfor %}
</section>
<h2>Curves</h2>
{{ plot(charts[0], true) }}
<div class="grid charts">{% for c in charts[1:] %}{{ plot(c) }}{% endfor %}</div>
<h2>Plan beside measured</h2>
<div class="card scroll"><table class="compare">
<thead><tr><th></th>
<th class="num">planned</th><th class="num">measured</th><th class="num">difference</th></tr></thead>
<tbody>{% for name, predicted, measured, difference in compared %}
<tr><th>{{ name }}</th><td class="num">{{ predicted }}</td><td class="num">{{ measured }}</td>
<td class="num">{{ difference }}</td></tr>{% endfor %}</tbody></table>
{% if notes %}<ul class="soft">{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>{% endif %}</div>
<div class="grid charts">
{{ bars("Memory per rank, as planned", memory, memory_total) }}
{{ bars("Time per step, as planned", times, times_total) }}
</div>
<h2>Provenance</h2>
{{ facts(provenance) }}
<h2>Events</h2>
<div class="card scroll"><table><thead><tr><th>time (UTC)</th><th>event</th><th>details</th></tr></thead>
<tbody>{% for time, kind, details in events %}<tr><td style="white-space:nowrap">{{ time }}</td><td>{{ kind }}</td>
<td class="small">{{ details }}</td></tr>{% endfor %}</tbody></table></div>
<h2>Recipe</h2>
<div class="card"><details><summary>The recipe with everything it extends</summary>
<pre>{{ recipe }}</pre></details></div>
</main>
</body>
</html>
"""
)
