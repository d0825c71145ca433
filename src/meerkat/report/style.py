"""Colours of figures, and the page's CSS.

The hues are Okabe and Ito's, which people with any colour blindness can tell apart; lines also differ in dashes or
markers.
"""

INK, MUTED, GRID, PAPER, GREY = "#1c1f24", "#666c75", "#dde0e4", "#fefefe", "#9aa1ab"
BLUE, RED, GREEN, PURPLE = "#0069a8", "#cf5300", "#008f6b", "#b8568f"
ORANGE, SKY, BROWN = "#d99000", "#4da9dd", "#7a5230"
ON_HEAT = "#ffffff"
"""Text on a deep shade of a heat map, in light and in dark."""
CYCLE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BROWN)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
VARIABLES = {
    **{INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper", GREY: "rest", BLUE: "blue", RED: "red"},
    **{GREEN: "green", PURPLE: "purple", ORANGE: "orange", SKY: "sky", BROWN: "brown"},
}
"""Each colour's CSS variable: the colour itself in light, the value below in dark."""

STYLE = """
:root{color-scheme:light dark;--font:system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;
--page:#fff;--soft:#f5f6f8;--line:#e3e6ea;--good:#00664c;--bad:#a33a00;--open:#5c636d}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e6e8eb;--muted:#a0a7b1;--grid:#2b3038;--paper:#15171b;
--rest:#737c88;--blue:#58aee8;--red:#ff8f52;--green:#3fc79f;--purple:#e596c4;--orange:#f0b444;--sky:#9bd6f8;
--brown:#cba27c;--page:#15171b;--soft:#1d2025;--line:#2e333b;--good:#4fd1ab;--bad:#ff9a66;--open:#aab1bb}}
*{box-sizing:border-box}
html{scroll-padding-top:3.2rem;-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:1120px;padding:0 1.25rem 3rem;background:var(--page);color:var(--ink);
font:16px/1.55 var(--font)}
header{padding:2.4rem 0 .4rem}
h1{margin:0;font-size:1.9rem;line-height:1.2;letter-spacing:-.015em;overflow-wrap:anywhere}
header p{margin:.4rem 0 0;color:var(--muted);overflow-wrap:anywhere}
nav{position:sticky;top:0;z-index:2;display:flex;gap:1.15rem;overflow-x:auto;padding:.65rem 0;margin-bottom:.4rem;
background:var(--page);border-bottom:1px solid var(--line);font-size:.9rem;white-space:nowrap;scrollbar-width:none}
nav a{color:var(--muted);text-decoration:none}
nav a:hover,nav a:focus-visible{color:var(--ink);text-decoration:underline;text-underline-offset:.3em}
section{padding-top:1.1rem}
section:empty{display:none}
h2{font-size:1.28rem;margin:1rem 0 .5rem;letter-spacing:-.01em}
h3{font-size:1.02rem;margin:1.5rem 0 .4rem}
p{margin:.5rem 0;max-width:72ch;overflow-wrap:anywhere}
.lead{font-size:1.06rem}
.absent,.note{color:var(--muted)}
.alert{border-left:3px solid var(--orange);background:var(--soft);padding:.6rem .9rem;border-radius:0 6px 6px 0}
.numbers{display:grid;grid-template-columns:repeat(auto-fit,minmax(136px,1fr));gap:.4rem 1.2rem;margin:1.2rem 0}
.numbers div{border-top:2px solid var(--line);padding:.55rem 0 .4rem}
.numbers dt{color:var(--muted);font-size:.82rem}
.numbers dd{margin:.1rem 0 0}
.numbers b{font-size:1.45rem;font-weight:650;letter-spacing:-.01em;font-variant-numeric:tabular-nums;display:block;
line-height:1.25}
.numbers small{color:var(--muted);font-size:.8rem;line-height:1.35;display:block}
.plots{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:1.4rem 2.2rem;margin:1rem 0 .6rem;
grid-auto-flow:dense}
.plots figure{margin:0;min-width:0}
.plots .wide{grid-column:1/-1}
.plots .lone{grid-column:1/-1;display:grid;align-items:center;
grid-template-columns:repeat(2,minmax(0,1fr));gap:.4rem 2.2rem}
.plot svg{display:block;width:100%;height:auto;overflow:visible}
figcaption{color:var(--muted);font-size:.87rem;line-height:1.45;margin-top:.35rem;max-width:74ch}
figcaption b{color:var(--ink);font-weight:600}
.scroll{overflow-x:auto;margin:.7rem 0 1rem}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
.caption{color:var(--muted);font-size:.87rem;margin:.8rem 0 -.2rem}
th,td{text-align:left;padding:.34rem .75rem .34rem 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--muted);font-size:.82rem;vertical-align:bottom}
td{overflow-wrap:anywhere}
.t{white-space:nowrap}
.n{text-align:right;white-space:nowrap;padding-left:.3rem}
.best td{font-weight:650;background:var(--soft)}
small{font-weight:400}
td small{color:var(--muted);font-weight:400}
.meter{display:inline-block;width:7rem;height:.55rem;background:var(--soft);border-radius:3px;vertical-align:baseline;
overflow:hidden}
.meter i{display:block;height:100%;background:var(--blue)}
code{font:.88em/1.4 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
details{border:1px solid var(--line);border-radius:8px;padding:.15rem .9rem;margin:.6rem 0}
summary{cursor:pointer;padding:.45rem 0;font-weight:600}
.pill{display:inline-block;border:1px solid currentColor;border-radius:99px;padding:.02rem .6rem;font-size:.82rem;
font-weight:650;white-space:nowrap}
.holds{color:var(--good)}.fails{color:var(--bad)}.undecided{color:var(--open)}
.claim{display:flex;flex-wrap:wrap;gap:.3rem .8rem;align-items:baseline;margin:1rem 0 0;padding-top:.8rem;
border-top:1px solid var(--line);max-width:none}
footer{margin-top:2.5rem;padding-top:.8rem;border-top:1px solid var(--line);color:var(--muted);font-size:.85rem}
@media (max-width:720px){body{padding:0 .9rem 2rem}
.plots,.plots .lone{grid-template-columns:minmax(0,1fr)}
.wide .plot{overflow-x:auto}.wide .plot svg{min-width:680px}.numbers{grid-template-columns:repeat(2,minmax(0,1fr))}
.numbers b{font-size:1.2rem}h1{font-size:1.5rem}}
@media print{nav{display:none}body{max-width:none}figure{break-inside:avoid}}
"""
