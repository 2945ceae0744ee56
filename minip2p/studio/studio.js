/* What Gradio has no widget for: the words' rows, and the frame of page.html. */
"use strict";

/* The rows: a window with two handles, a weight and a blend for each word. props.value holds
   {rows, all, layout, windows, weights, blend}; the server changes the rows alone. */
function studioWords(element, props, trigger, watch) {
  let said = props.value;
  const list = element.appendChild(document.createElement("div"));
  list.className = "words";

  function make(tag, name, label, attributes = {}) {
    const made = document.createElement(tag);
    made.className = name;
    if (label) made.setAttribute("aria-label", label);
    return Object.assign(made, attributes);
  }
  function change(part) {
    said = {...said, ...part};
    props.value = said;
    trigger("input");
  }
  function set(part, word, value) { change({[part]: {...said[part], [word]: value}}); }

  function bar(name, get, put) {  /* two ranges on top of each other: start and end */
    const track = make("span", "bar"), fill = make("i", ""), text = make("output", "span");
    const handles = ["start", "end"].map(which => make("input", which, `${name}: ${which} of the window`,
      {type: "range", min: 0, max: 1, step: .01}));
    handles.forEach((handle, n) => handle.addEventListener("input", () => {
      const when = handles.map(h => +h.value);
      if (when[0] > when[1]) when[1 - n] = when[n];  /* one handle pushes the other */
      put(when);
      show();
    }));
    function show() {
      const when = get();
      handles.forEach((handle, n) => { handle.value = when[n]; });
      handles[0].style.zIndex = when[0] > .5 ? 2 : 1;  /* both at one end: the one that can move is above */
      fill.style.left = `${100 * when[0]}%`;
      fill.style.right = `${100 - 100 * when[1]}%`;
      text.value = when[0] < when[1] ? `${Math.round(100 * when[0])}–${Math.round(100 * when[1])} %` : "never";
    }
    track.append(fill, ...handles);
    return [track, text, show];
  }

  function weight(word) {
    const text = make("output", "times");
    const range = make("input", "weight", `${word}: weight`, {type: "range", min: -2, max: 4, step: .1});
    const show = () => { range.value = said.weights[word] ?? 1; text.value = `× ${range.value}`; };
    range.addEventListener("input", () => { set("weights", word, +range.value); show(); });
    return [range, text, show];
  }

  function blend(word) {
    const label = make("label", "blend"), box = make("input", "", `${word}: blend`, {type: "checkbox"});
    label.title = "Change the picture only where this word is";
    const show = () => { box.checked = said.blend[word] ?? false; };
    box.addEventListener("change", () => set("blend", word, box.checked));
    label.append(box, make("span", "said", "", {textContent: "blend"}));
    return [label, show];
  }

  const shows = [];
  function row(name, title, ...parts) {
    const made = make("div", "row");
    made.append(make("span", "name", "", {textContent: name, title}));
    for (const part of parts.flat()) typeof part === "function" ? shows.push(part) : made.append(part);
    list.append(made);
    return made;
  }
  function draw() {
    list.replaceChildren();
    shows.length = 0;
    if (!said.rows.length) return;  /* the source alone */
    list.append(make("p", "hint", "", {textContent: "In its window, a word looks where the source looks. Its weight makes it louder. Blending changes the picture only where the word is."}));
    const head = row("", "");
    head.classList.add("head");
    head.append(...["bar", "weight", "blend"].map(name => make("span", name, "", {textContent: {bar: "window"}[name] ?? name})));
    row("all words", "Every word without a window of its own", bar("all words", () => said.all, when => { change({all: when}); shows.forEach(f => f()); }));
    for (const {name, own} of said.rows) {
      if (!own) { row(name, "Of the source alone", blend(name)); continue; }
      const made = row(name, name, bar(name, () => said.windows[name] ?? said.all, when => set("windows", name, when)), weight(name), blend(name));
      const reset = make("button", "reset", `${name}: as all words`, {textContent: "↺", title: "As all words"});
      const mark = () => made.classList.toggle("changed", name in said.windows || (said.weights[name] ?? 1) !== 1 || !!said.blend[name]);
      reset.addEventListener("click", () => {
        const without = part => Object.fromEntries(Object.entries(said[part]).filter(([word]) => word !== name));
        change({windows: without("windows"), weights: without("weights"), blend: without("blend")});
        shows.forEach(f => f());
      });
      made.classList.add("own");
      made.append(reset);
      made.addEventListener("input", mark);
      shows.push(mark);
    }
    row("layout", "Self-attention: where things are", bar("layout", () => said.layout, when => change({layout: when})));
    shows.forEach(f => f());
  }
  watch("value", () => {  /* rows from the server; what the visitor set stays */
    const {rows} = props.value, same = JSON.stringify(rows) === JSON.stringify(said.rows);
    said = {...said, rows};
    props.value = said;
    if (!same) draw();
  });
  draw();
}

/* The page in a sandbox: it can run its script, and reach nothing of this page. */
function studioFrame(element, props, trigger, watch) {
  let kept = "{}";  /* what the visitor did in the last page */
  const frames = () => [...element.querySelectorAll("iframe")];
  addEventListener("message", event => {
    const frame = frames().find(one => one.contentWindow === event.source);
    if (!frame) return;
    kept = JSON.stringify(event.data);
    frame.style.height = `${Math.min(Number(event.data.height) || 0, 20000)}px`;
  });
  function load() {
    const text = props.value.page;
    if (!text) return;
    const next = document.createElement("iframe");
    next.setAttribute("sandbox", "allow-scripts");
    next.title = "The pictures, and where they look";
    next.name = kept;
    next.srcdoc = text.replace("</body>", () => `${studioStyle}<script>(${studioInside})()<\/script></body>`);
    next.className = "coming";
    next.addEventListener("load", () => {  /* the old one stays until the new one is drawn */
      frames().slice(0, frames().indexOf(next)).forEach(one => one.remove());
      next.className = "";
    });
    element.append(next);
  }
  watch("value", load);
  load();
}

const studioStyle = `<style>
  h1 { display: none; }
  body { max-width: none; padding: .25rem .75rem 1rem; }
  @media (min-width: 34rem) {
    #pictures { gap: .9rem; grid: auto / auto-flow minmax(0, 1fr); }  /* one row */
  }
  @media (max-width: 34rem) { h2, #tables, dl { display: none; } }
</style>`;

/* Runs in the page, beside its script: a pinned word and a chosen call outlive the page. */
function studioInside() {
  const kept = JSON.parse(window.name || "{}");
  pinned = all(".word").find(b => b.dataset.row === kept.row && b.textContent === kept.text) ?? null;
  go(Math.min(kept.view ?? 0, run.shown.length));
  const tell = () => parent.postMessage({
    height: document.documentElement.offsetHeight, view, row: pinned?.dataset.row, text: pinned?.textContent,
  }, "*");
  for (const type of ["click", "focusin", "keydown", "input"]) document.addEventListener(type, tell);
  new ResizeObserver(tell).observe(document.documentElement);
}
