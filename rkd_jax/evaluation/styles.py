"""The style sheet of the report: one column, quiet lines, both colour schemes."""

STYLES = """
:root {
  color-scheme: light dark;
  --page: #fbfcfd; --panel: #ffffff; --text: #1d2430; --muted: #6b7482;
  --line: #e6e9ee; --soft: #f4f6f9; --good: #0b7a55; --good-soft: #e4f5ee;
  --bad: #b3261e; --bad-soft: #fceceb; --warn: #92500a; --warn-soft: #fdf3e1;
  --accent: #2563c9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #111419; --panel: #171b22; --text: #e4e8ee; --muted: #98a2b1;
    --line: #2b313c; --soft: #1d222b; --good: #55d3a5; --good-soft: #14332a;
    --bad: #ff8a80; --bad-soft: #3a1c1b; --warn: #f0b45c; --warn-soft: #352712;
    --accent: #6ea3ff;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; padding: 3rem clamp(1rem, 4vw, 3rem) 5rem;
  background: var(--page); color: var(--text);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
    "Noto Sans", "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums;
}
header, main { max-width: 1320px; margin: 0 auto; }
h1 { font-size: 1.75rem; line-height: 1.2; font-weight: 650; letter-spacing: -.015em;
  margin: 0 0 .4rem; text-wrap: balance; }
h2 { font-size: 1.1rem; font-weight: 650; margin: 0 0 .9rem; }
h3 { font-size: .85rem; font-weight: 600; color: var(--muted); margin: 1.2rem 0 .4rem; }
section { margin-top: 2.6rem; }
code, pre { font: .86em/1.5 ui-monospace, "SF Mono", Menlo, Consolas,
  "DejaVu Sans Mono", monospace; }
small { font-size: .78rem; color: var(--muted); font-weight: 400; }
.byline { color: var(--muted); margin: 0; display: flex; gap: .4rem 1rem;
  flex-wrap: wrap; align-items: baseline; font-size: .9rem; }
.byline code { background: var(--soft); border-radius: 4px; padding: .1rem .4rem; }
.muted, .none { color: var(--muted); }
.legend { color: var(--muted); font-size: .83rem; margin: .6rem 0 0; max-width: 100ch; }

.verdicts { list-style: none; margin: 0; padding: 0; display: grid; gap: .45rem; }
.verdicts li { display: flex; gap: .7rem; padding: .6rem .9rem; border-radius: 8px;
  background: var(--soft); }
.verdicts .mark { font-weight: 700; width: 1em; flex: none; color: var(--muted); }
.verdicts .pass { background: var(--good-soft); }
.verdicts .pass .mark { color: var(--good); }
.verdicts .fail { background: var(--bad-soft); }
.verdicts .fail .mark { color: var(--bad); }

.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px;
  background: var(--panel); }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .55rem .65rem; }
thead th { font-size: .8rem; font-weight: 600; color: var(--text); line-height: 1.3;
  border-bottom: 1px solid var(--line); vertical-align: bottom; }
thead span { white-space: nowrap; }
thead small { display: block; font-size: .7rem; line-height: 1.25; max-width: 9em; }
tbody th { font-weight: 600; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
td small { display: block; white-space: nowrap; }
.policies th, .policies td { padding: .5rem .45rem; }
.policies td, .policies thead th + th { text-align: right; }
.policies thead th + th small { margin-left: auto; }
.policies td { white-space: nowrap; }
.policies tbody th { min-width: 8.5em; position: sticky; left: 0;
  background: var(--panel); }
.policies tr.teacher > *, .policies tr.start > * { background: var(--soft); }
.policies tr.flagged > * { background: var(--warn-soft); }
.policies td.best { color: var(--good); font-weight: 700; }
.role { color: var(--muted); font-weight: 400; font-size: .8rem; margin-left: .45rem; }
.policies tr.why > td { border-top: 0; padding-top: 0; text-align: left; }
.flags { display: flex; flex-wrap: wrap; gap: .1rem 1.4rem; color: var(--warn);
  font-size: .8rem; font-weight: 500; }
.differences td:nth-child(4), .data td:nth-child(2), .data td:nth-child(3) {
  color: var(--muted); }
.differences td { white-space: nowrap; }
.minus { color: var(--muted); font-weight: 400; }
.chip { display: inline-block; border-radius: 99px; padding: .02rem .6rem;
  font-size: .8rem; background: var(--soft); color: var(--muted); }
.chip.higher { background: var(--good-soft); color: var(--good); }
.chip.lower { background: var(--bad-soft); color: var(--bad); }
.data ul { margin: 0; padding: 0; list-style: none; }

.figures { display: grid; gap: 1rem; align-items: stretch;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; padding: 1rem; border: 1px solid var(--line); border-radius: 10px;
  background: var(--panel); display: flex; flex-direction: column;
  justify-content: space-between; }
figure.wide { grid-column: 1 / -1; }
figure img { width: 100%; height: auto; display: block; }
figcaption { color: var(--muted); font-size: .83rem; margin-top: .6rem; }

article { margin-top: 1.8rem; }
.prompt { margin: 0 0 .6rem; padding-left: .8rem; border-left: 3px solid var(--accent);
  font-weight: 550; white-space: pre-wrap; overflow-wrap: anywhere; max-width: 90ch; }
.cards { display: grid; gap: .6rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.card { border: 1px solid var(--line); border-radius: 8px; background: var(--panel);
  padding: .6rem .8rem .7rem; }
.who { display: flex; justify-content: space-between; font-size: .8rem;
  color: var(--muted); margin-bottom: .25rem; }
.card.flagged { background: var(--warn-soft); }
.card.flagged .who { color: var(--warn); }
.score.best { color: var(--good); font-weight: 700; }
.text { font-size: .88rem; line-height: 1.5; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 15rem; overflow-y: auto; }

.timings { max-width: 46rem; }
.timings th, .timings td { padding: .2rem .8rem .2rem 0; border: 0 !important;
  font-weight: 400; vertical-align: middle; white-space: nowrap; }
.timings td:nth-child(2) { text-align: right; color: var(--muted); }
.timings td:last-child { width: 55%; }
.timings .total > * { font-weight: 600; color: var(--text) !important; }
.bar { display: block; height: .55rem; border-radius: 99px; background: var(--accent);
  opacity: .75; min-width: 2px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem;
  margin: 0; font-size: .88rem; }
dd { margin: 0; overflow-wrap: anywhere; color: var(--muted); }
details { margin-top: 1.2rem; border: 1px solid var(--line); border-radius: 10px;
  background: var(--panel); }
summary { cursor: pointer; padding: .6rem .9rem; font-weight: 600; font-size: .9rem; }
pre { margin: 0; padding: .2rem 1rem 1rem; overflow-x: auto; }
@media print { body { padding: 0; } details, .text { max-height: none; } }
"""
