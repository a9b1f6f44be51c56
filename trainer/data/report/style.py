"""The look of the audit page: one style sheet, light and dark, screen and paper."""

STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1b2430;--soft:#5c6878;--line:#dde2e9;--kept:#2f6fb5;
--kept2:#8fb8e0;--lost:#c2413a;--band:#2f6fb526;--context:#dfe4ea;--learned:#2a7d4f;--mark:#d6f0df;--good:#1f7a46;
--look:#8a5a00;--act:#b3261e;--good-bg:#e6f4eb;--look-bg:#fdf1d8;--act-bg:#fbe6e4;--none-bg:#eceff3}
@media(prefers-color-scheme:dark){:root{--page:#12161c;--card:#1a2029;--ink:#e6ebf2;--soft:#9ba8b8;--line:#2e3846;
--kept:#5f9fe3;--kept2:#34597f;--lost:#ef7d76;--band:#5f9fe333;--context:#37424f;--learned:#58b584;--mark:#1d4a33;
--good:#79d29e;--look:#f0c067;--act:#ff9a92;--good-bg:#16301f;--look-bg:#372a0c;--act-bg:#3c1a18;--none-bg:#242c37}}
*{box-sizing:border-box}
html{scroll-behavior:smooth}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans",sans-serif;overflow-wrap:anywhere}
main,header,footer{max-width:1000px;margin:0 auto;padding:0 24px}
header{padding-top:36px}
h1{font-size:28px;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:19px;margin:0 0 10px}
h3{font-size:14px;margin:22px 0 6px}
p{margin:6px 0 12px;max-width:74ch}
.sub,.muted-text{color:var(--soft)}
.verdict{display:inline-block;margin:14px 0 4px;padding:8px 14px;border-radius:8px;font-weight:600}
.good{background:var(--good-bg);color:var(--good)}.look{background:var(--look-bg);color:var(--look)}
.act{background:var(--act-bg);color:var(--act)}.none{background:var(--none-bg);color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(6,1fr);gap:10px;margin:16px 0 20px}
.tile{display:block;padding:12px 14px;border-radius:10px;text-decoration:none;border-top:4px solid currentColor}
.tile:focus-visible,a:focus-visible,summary:focus-visible{outline:3px solid var(--kept);outline-offset:2px}
.tile b{display:block;font-size:24px;line-height:1.25;color:var(--ink);font-variant-numeric:tabular-nums}
.tile .what{font-size:13px;font-weight:600;white-space:nowrap}
.tile .note{display:block;font-size:12.5px;color:var(--ink);opacity:.85}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:0 0 20px;font-size:14px}
a{color:var(--kept)}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:20px 24px 22px;margin:0 0 18px}
svg{display:block;max-width:100%;height:auto;margin:8px 0;font:12px system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans",sans-serif}
svg text{fill:var(--ink)}svg .muted,svg .axis{fill:var(--soft)}svg .axis{font-size:11px}svg .name{font-size:13px;
font-weight:600}svg .bad-text{fill:var(--lost)}svg .mark-text{font-size:11px;fill:var(--ink)}
svg .value{font-variant-numeric:tabular-nums}
.kept{fill:var(--kept)}.kept2{fill:var(--kept2)}.lost{fill:var(--lost)}.band{fill:var(--band)}
.context{fill:var(--context)}.learned{fill:var(--learned)}.neutral{fill:var(--soft)}
.grid{stroke:var(--line)}.axis-line{stroke:var(--soft)}.leader{stroke:var(--lost);stroke-dasharray:2 3;opacity:.7}
.mark-line{stroke:var(--ink);stroke-dasharray:4 3}.limit-line{stroke:var(--lost);stroke-width:2}
table{border-collapse:collapse;width:100%;font-size:13.5px;margin:8px 0}
th,td{text-align:left;padding:5px 12px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600;overflow-wrap:normal}td{min-width:9ch}td.n{min-width:0}
td.n+td,th.n+th{padding-left:14px}table.pairs{width:auto}table.pairs td{padding-right:36px}
.unseen{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap;overflow-wrap:normal}
.scroll{overflow-x:auto}
details{margin:10px 0 0}summary{cursor:pointer;color:var(--kept);font-size:13.5px}
code,pre,.place{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:12.5px}
figure{margin:0 0 18px}figcaption{font-size:13px;color:var(--soft);margin-bottom:4px}
pre{margin:0;padding:12px 14px;border:1px solid var(--line);border-radius:8px;background:var(--page);
white-space:pre-wrap;max-height:420px;overflow:auto;color:var(--soft)}
pre mark{background:var(--mark);color:var(--ink);border-bottom:2px solid var(--learned);border-radius:2px}
.warn{color:var(--lost)}
footer{color:var(--soft);font-size:13px;padding-bottom:40px}
@media(max-width:900px){.tiles{grid-template-columns:repeat(3,1fr)}}
@media(max-width:640px){.tiles{grid-template-columns:repeat(2,1fr)}
main,header,footer{padding-left:12px;padding-right:12px}section{padding:14px}
.drawing{overflow-x:auto}.drawing svg{max-width:none}}
@media print{:root{color-scheme:light;--page:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#bbb;--kept:#2f6fb5;
--kept2:#8fb8e0;--lost:#b3261e;--band:#2f6fb526;--context:#dfe4ea;--learned:#2a7d4f;--mark:#d6f0df;--good:#1f7a46;
--look:#8a5a00;--act:#b3261e;--good-bg:#fff;--look-bg:#fff;--act-bg:#fff;--none-bg:#fff}
nav{display:none}body{font-size:11pt}section{border:0;padding:0 0 12px}svg,figure,tr{break-inside:avoid}
h2,h3{break-after:avoid}pre{max-height:none}details::details-content{content-visibility:visible;block-size:auto}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
