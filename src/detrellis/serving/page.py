"""The page of the server: drop a picture, see what is detected.
It needs no other file, and no other server.
"""

from __future__ import annotations

from html import escape

from detrellis.webpage import document

STYLE = """
#drop { display: block; border: 2px dashed var(--line); border-radius: .5rem; padding: 2rem 1rem; text-align: center;
  cursor: pointer; background: var(--box); }
#drop.over, #drop:focus-within { border-color: var(--accent); }
#drop input { position: absolute; opacity: 0; width: 1px; height: 1px; }
#said { min-height: 1.6em; }
#said.wrong { color: #b3261e; font-weight: 600; }
@media (prefers-color-scheme: dark) { #said.wrong { color: #ff8a80; } }
#dial { display: flex; gap: .8rem; align-items: center; margin: .8rem 0; }
#dial input { flex: 1; max-width: 24rem; }
#stage { position: relative; }
#stage img, #stage svg { display: block; width: 100%; height: auto; }
#stage svg { position: absolute; inset: 0; height: 100%; }
#found { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .2rem 1.2rem; padding: 0;
  list-style: none; overflow-wrap: anywhere; }
#found i { display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem; }
[hidden] { display: none !important; }
"""

# Names come from a data set: they are set as text, never as HTML.
SCRIPT = """
const at = id => document.getElementById(id), dial = at("threshold"), space = "http://www.w3.org/2000/svg";
const colours = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8f6bd1", "#b3261e"];
let answer = null, latest = 0;
function say(text, wrong) { at("said").textContent = text; at("said").className = wrong ? "wrong" : ""; }
function part(kind, values, text) {
  const made = document.createElementNS(space, kind);
  for (const name in values) made.setAttribute(name, values[name]);
  if (text !== undefined) made.textContent = text;
  return made;
}
function draw() {
  at("level").textContent = Number(dial.value).toFixed(2);
  at("boxes").replaceChildren(); at("found").replaceChildren();
  if (!answer) return;
  const shown = answer.detections.filter(d => d.score >= Number(dial.value));
  const across = at("stage").clientWidth || 600, unit = answer.width / across;
  at("boxes").setAttribute("viewBox", `0 0 ${answer.width} ${answer.height}`);
  for (const d of shown) {
    const colour = colours[Math.abs(d.category_id) % colours.length], [x, y, w, h] = d.bbox;
    const name = `${d.category_name} ${d.score.toFixed(2)}`, top = Math.max(y - 5 * unit, 13 * unit);
    const left = x + w / 2 < answer.width / 2;
    at("boxes").append(
      part("rect", {x, y, width: w, height: h, fill: "none", stroke: colour, "stroke-width": 2 * unit}),
      part("text", {x: left ? x : x + w, y: top, "text-anchor": left ? "start" : "end", "font-size": 13 * unit,
        fill: colour, stroke: "#fff", "stroke-width": 3 * unit, "paint-order": "stroke", "font-family": "sans-serif",
        "font-weight": 600}, name));
    const row = document.createElement("li"), mark = document.createElement("i");
    mark.style.background = colour; row.append(mark, name); at("found").append(row);
  }
  say(shown.length === 1 ? "1 object" : `${shown.length} objects`);
}
async function look(file) {
  const number = ++latest;
  say(`${file.name}: looking ...`); answer = null; draw(); say(`${file.name}: looking ...`);
  const url = URL.createObjectURL(file), picture = at("picture");
  picture.onload = () => { URL.revokeObjectURL(url); draw(); };
  picture.onerror = () => URL.revokeObjectURL(url);
  picture.src = url; picture.alt = file.name; at("stage").hidden = false;
  try {
    const reply = await fetch("predict?threshold=0.01", {method: "POST", body: file,
      headers: {"Content-Type": "application/octet-stream"}});
    const told = await reply.json();
    if (number !== latest) return;
    if (reply.status === 400) throw new Error(`${file.name}: no picture that can be read here`);
    if (!reply.ok) throw new Error([told.error.message, told.error.remedy].filter(Boolean).join(". "));
    answer = told; at("dial").hidden = false; draw();
  } catch (error) {
    if (number === latest) { at("stage").hidden = true; say(error.message, true); }
  }
}
const drop = at("drop");
at("file").onchange = event => event.target.files.length && look(event.target.files[0]);
dial.oninput = draw; window.onresize = draw;
for (const kind of ["dragenter", "dragover"])
  document.addEventListener(kind, event => { event.preventDefault(); drop.classList.add("over"); });
for (const kind of ["dragleave", "drop"])
  document.addEventListener(kind, event => { event.preventDefault(); drop.classList.remove("over"); });
document.addEventListener("drop", event => event.dataTransfer.files.length && look(event.dataTransfer.files[0]));
draw(); say("");
"""


def page(name: str, classes: int, threshold: float) -> str:
    """The page for a detector of that name; `threshold` is where the dial stands first."""
    count = "1 class" if classes == 1 else f"{classes} classes"
    return document(
        f"{name}: detect objects",
        [
            f"<style>{STYLE}</style>",
            f"<h1>{escape(name)}</h1>",
            f'<p class="soft">{count}. Pictures stay between this page and its server.</p>',
            '<label id="drop">Drop a picture here, or <u>choose one</u>'
            '<input id="file" type="file" accept="image/*"></label>',
            f'<div id="dial" hidden><label for="threshold">Lowest score</label>'
            f'<input id="threshold" type="range" min="0.01" max="1" step="0.01" value="{threshold:.2f}">'
            '<output id="level" for="threshold"></output></div>',
            '<p id="said" role="status"></p>',
            '<div id="stage" hidden><img id="picture" alt=""><svg id="boxes" aria-hidden="true"></svg></div>',
            '<ul id="found"></ul>',
            f"<script>{SCRIPT}</script>",
        ],
    )
