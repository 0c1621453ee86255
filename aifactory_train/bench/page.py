"""The page of a bench report as a jinja2 template; its head and most of its style are those of a training report."""

from aifactory_train.results.page import head

_STYLE = """\
:root { --s0: #1c5d99; --s1: #a88414; --s2: #3b7d4f; --s3: #7d5ba6; --s4: #c2508f; --s5: #6b7280; --bad: #b3342d; }
@media (prefers-color-scheme: dark) { :root { --s0: #7fb2e5; --s1: #dcc062; --s2: #7cc294; --s3: #bda2e8; --s4: #ef93c4;
  --s5: #a8b0ba; --bad: #f0857d; } }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); } .s3 { --c: var(--s3); } .s4 { --c: var(--s4); }
.s5 { --c: var(--s5); } .system { --c: var(--s3); } .straggler { --c: var(--bad); }
.line { stroke: var(--c); stroke-width: 1.75; } .line.s0:not(:only-of-type) { stroke-width: 3.5; }
.plot svg .band { fill: var(--c); opacity: 0.16; }
.whisker { stroke: var(--s0); stroke-width: 2; }
.plot i.dot { bottom: auto; width: 9px; height: 9px; margin: -4.5px 0 0 -4.5px; background: var(--c, var(--s0));
  border: 1.5px solid var(--card); }
.plot.scatter i.dot { width: 13px; height: 13px; margin: -6.5px 0 0 -6.5px; }
.legend u { border-color: var(--c, var(--curve)); }
.legend u.spot { width: 9px; height: 9px; border: 0; border-radius: 50%; background: var(--c); }
.remarks { margin-top: 8px; font-size: 13px; color: var(--soft); }
.finding { display: grid; grid-template-columns: 168px 1fr; gap: 2px 16px; padding: 7px 0; font-size: 14.5px;
  border-top: 1px solid var(--line); overflow-wrap: anywhere; }
.finding:first-of-type { border-top: 0; }
.finding b { font-weight: 620; overflow-wrap: normal; } .finding.bad b { color: var(--bad); }
.finding.odd b { color: var(--level); }
.boxes { margin: 14px 0 26px; display: grid; grid-template-columns: fit-content(40%) 1fr auto; gap: 0 12px;
  font-size: 13px; position: relative; }
.boxes > * { line-height: 24px; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.boxes .row { position: relative; height: 24px; overflow: visible; }
.row s, .row q, .row em { position: absolute; background: var(--c, var(--s0)); } .row q { quotes: none; }
.row s { height: 1.5px; top: 11px; } .row q { height: 12px; top: 6px; opacity: 0.35; min-width: 3px;
  border-radius: 2px; }
.row em { width: 3px; height: 16px; top: 4px; margin-left: -1.5px; }
.boxes .bad { color: var(--bad); font-weight: 620; --c: var(--bad); }
.row.scale { height: 0; } .row.scale span { position: absolute; top: 3px; font-size: 12px; color: var(--soft);
  transform: translateX(-50%); line-height: 1.4; }
td.wide { min-width: 190px; } details { margin-bottom: 10px; }
@media (max-width: 560px) { .finding { grid-template-columns: 1fr; } .boxes { gap: 0 8px; } }
"""

PAGE = (
    head("benchmark report", _STYLE)
    + """<body>
{% macro plot(c) %}
<figure class="card" style="margin:0">
<div class="head"><h3>{{ c.title }}</h3><span class="soft small">{{ c.note }}</span></div>
<div class="plot{{ ' scatter' if not c.lines }}" role="img" aria-label="{{ c.title }}: {{ c.about }}">
<svg viewBox="0 0 100 100" preserveAspectRatio="none">
{% for t in c.y_ticks %}<line class="rule" x1="0" x2="100" y1="{{ t.place }}" y2="{{ t.place }}"/>{% endfor %}
{% for l in c.lines if l.band %}<polygon class="band s{{ l.style }}" points="{{ l.band }}"/>{% endfor %}
{% for l in c.levels %}<line class="level" x1="0" x2="100" y1="{{ l.place }}" y2="{{ l.place }}"/>{% endfor %}
{% for w in c.whiskers %}<line class="whisker" x1="{{ w.x }}" x2="{{ w.x }}" y1="{{ w.low }}" y2="{{ w.high }}"/>
{% endfor %}
{% for l in c.lines %}<polyline class="line s{{ l.style }}" data-points="{{ l.n_points }}" points="{{ l.points }}"/>
{% endfor %}
</svg>
{% for t in c.y_ticks %}<span class="y" style="top:{{ t.place }}%">{{ t.label }}</span>{% endfor %}
{% for t in c.x_ticks %}<span class="x" style="left:{{ t.place }}%">{{ t.label }}</span>{% endfor %}
{% for d in c.dots %}<i class="dot {{ d.kind }}" style="left:{{ d.x }}%;top:{{ d.y }}%" title="{{ d.label }}"></i>
{% endfor %}
</div>
<div class="legend">
{% for l in c.lines %}<span class="s{{ l.style }}"><u></u>{{ l.label }}</span>{% endfor %}
{% for l in c.levels %}<span><u class="level"></u>{{ l.label }}</span>{% endfor %}
{% for kind, text in c.legend %}<span class="{{ kind }}"><u class="spot"></u>{{ text }}</span>{% endfor %}
</div>
{% for remark in c.remarks %}<p class="remarks">{{ remark }}</p>{% endfor %}
</figure>
{% endmacro %}
{% macro boxes(c) %}
<figure class="card" style="margin:0">
<div class="head"><h3>{{ c.title }}</h3><span class="soft small">{{ c.note }}</span></div>
<div class="boxes" role="img" aria-label="{{ c.title }}: box plot by node">
{% for b in c.boxes %}
{% set kind = ' bad' if b.why else '' %}
<span class="name{{ kind }}">{{ b.name }}</span>
<div class="row{{ kind }}" title="{{ b.why }}"><s style="left:{{ b.low }}%;width:{{ (b.high - b.low)|round(2) }}%"></s>
<q style="left:{{ b.first }}%;width:{{ (b.third - b.first)|round(2) }}%"></q>
<em style="left:{{ b.median }}%"></em></div>
<span class="num{{ kind }}">{{ b.median_text }}</span>
{% endfor %}
<span></span><div class="row scale">
{% for t in c.x_ticks %}<span style="left:{{ t.place }}%">{{ t.label }}</span>{% endfor %}</div><span></span>
</div>
<p class="remarks">Median, box of the middle half, line from the 5th to the 95th percentile.
{% if c.n_left_out %}{{ c.n_left_out }} more nodes, none of them an outlier, are not drawn.{% endif %}
</p></figure>
{% endmacro %}
{% macro table(names, rows, numbers) %}
<div class="scroll"><table><thead><tr>
{% for name in names %}<th{{ ' class=num' if loop.index0 in numbers }}>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr>{% for value in row %}
<td class="{{ 'num' if loop.index0 in numbers else 'wide' if loop.first }}">{{ value }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endmacro %}
<main>
<header><h1>{{ title }}</h1><p class="soft">{{ subtitle }}</p></header>
{% if tiles %}<section class="tiles">
{% for name, (value, unit), under in tiles %}
<div class="tile"><span class="soft small">{{ name }}</span><b>{{ value }} <small>{{ unit }}</small></b>
<span class="soft small">{{ under }}</span></div>
{% endfor %}
</section>{% endif %}
{% if findings %}<h2>What stands out</h2>
<div class="card">{% for f in findings %}<div class="finding {{ f.kind }}"><b>{{ f.head }}</b><span>{{ f.text }}</span>
</div>{% endfor %}</div>{% endif %}
{% if unread %}<h2>What could not be read</h2>
<div class="card">{% for probe, reason, where in unread %}<div class="finding"><b>{{ probe }}</b>
<span>{{ reason }} <span class="soft">({{ where }})</span></span></div>{% endfor %}</div>{% endif %}
{% if steps %}<h2>Step time</h2>
<div class="grid">{% for c in steps.plots %}{{ plot(c) }}{% endfor %}</div>
{% if steps.rest %}<p class="remarks">{{ steps.rest }}</p>{% endif %}{% endif %}
{% if nodes %}<h2>Nodes beside each other</h2>
<div class="card"><p>{{ nodes.n_nodes }} nodes in {{ nodes.n_cells }} comparisons:
{% if nodes.outliers %}{{ nodes.outliers|map('first')|join(', ') }} {{ 'is an outlier' if nodes.outliers|length == 1
 else 'are outliers' }}.{% else %}no outlier.{% endif %} {{ nodes.rest }}</p></div>
<div class="grid charts">{% for c in nodes.plots %}{{ boxes(c) }}{% endfor %}</div>{% endif %}
{% if collectives %}<h2>Collectives</h2>
<div class="grid">{% for c in collectives %}{{ plot(c) }}{% endfor %}</div>{% endif %}
{% if scaling %}<h2>Scaling</h2>
<div class="grid">{% for s in scaling %}<div>{{ plot(s.plot) }}
<div class="card" style="margin-top:14px">
{{ table(("nodes", "rate per device", "efficiency", "95 % interval", "samples"), s.rows, (0, 1, 2, 3, 4)) }}
<p class="remarks">{{ s.base }}</p></div></div>{% endfor %}</div>{% endif %}
{% if planned %}<h2>Plan beside measured</h2>
<div class="card">
{{ table(("cell", "", "planned", "measured", "difference"), planned, (2, 3, 4)) }}</div>{% endif %}
{% if energy %}<h2>Energy beside throughput</h2>
<div class="card">
{{ table(("cell", "throughput", "scope, method", "mean power", "energy", "per token"), energy.rows, (1, 3, 4, 5)) }}
<p class="remarks">Scopes are never added. Energy has one number for all timed steps of a cell,
so no interval.{% if energy.n_unread %}
 Why {{ energy.n_unread }} of the cells have no reading
stands above, under what could not be read.{% endif %}</p></div>
{% if energy.plots %}<div class="grid charts">{% for c in energy.plots %}{{ plot(c) }}{% endfor %}</div>{% endif %}
{% endif %}
{% if metrics %}<h2>All metrics</h2>
<div class="card">{% for benchmark, rows in metrics.items() %}<details{{ ' open' if rows|length <= 12 }}>
<summary>{{ benchmark }} <span class="soft small">{{ rows|length }} metrics</span></summary>
{{ table(("cell", "nodes", "metric", "median", "95 % interval", "n", "worst rank", "verdict"), rows, (3, 4, 5)) }}
</details>{% endfor %}</div>{% endif %}
{% if provenance.common or provenance.different %}<h2>Provenance</h2>
<div class="card">{% if provenance.different %}<h3>What differs</h3>
<div class="scroll"><table><tbody>{% for key, values in provenance.different %}{% for value, hosts in values %}
<tr><th>{{ key if loop.first }}</th><td><code>{{ value }}</code></td><td class="wide">{{ hosts }}</td></tr>
{% endfor %}{% endfor %}</tbody></table></div>
{% endif %}
<details style="margin:10px 0 0"><summary>What all records have in common
<span class="soft small">{{ provenance.common|length }} facts</span></summary>
<div class="scroll"><table><tbody>{% for key, value in provenance.common %}
<tr><th>{{ key }}</th><td><code>{{ value }}</code></td></tr>{% endfor %}</tbody></table></div></details></div>
{% endif %}
</main>
</body>
</html>
"""
)
