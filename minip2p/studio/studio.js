/* What Gradio has no widget for: the words' rows, the picture, and the frame of page.html. */
"use strict";

function studioElement(tag, className, label, properties = {}) {
  const element = document.createElement(tag);
  element.className = className;
  if (label) element.setAttribute("aria-label", label);
  return Object.assign(element, properties);
}

/* The windows of all words and of self-attention, and for each word a window, a weight and a blend.
   props.value holds {rows, cross_replace_steps, self_replace_steps, windows, weights, blend}; the
   server changes the rows alone. */
function studioWords(element, props, trigger, watch) {
  let settings = props.value;
  let updates = [];  /* each shows a setting in its widget */
  const list = element.appendChild(studioElement("div", "words"));

  function change(part) {
    settings = {...settings, ...part};
    props.value = settings;
    trigger("input");
  }
  function set(part, word, value) { change({[part]: {...settings[part], [word]: value}}); }
  const update = () => updates.forEach(show => show());

  function bar(name, get, put) {  /* two ranges on top of each other: start and end */
    const track = studioElement("span", "bar"), fill = studioElement("i", "");
    const text = studioElement("output", "span");
    const handles = ["start", "end"].map(end => studioElement("input", end,
      `${name}: ${end} of the window`, {type: "range", min: 0, max: 1, step: .01}));
    handles.forEach((handle, n) => handle.addEventListener("input", () => {
      const window = handles.map(h => +h.value);
      if (window[0] > window[1]) window[1 - n] = window[n];  /* one handle pushes the other */
      put(window);
      update();
    }));
    updates.push(() => {
      const window = get();
      handles.forEach((handle, n) => { handle.value = window[n]; });
      handles[0].style.zIndex = window[0] > .5 ? 2 : 1;  /* at one end, the one that can move is above */
      fill.style.left = `${100 * window[0]}%`;
      fill.style.right = `${100 - 100 * window[1]}%`;
      text.value = window[0] < window[1] ? `${Math.round(100 * window[0])}–${Math.round(100 * window[1])} %` : "never";
    });
    track.append(fill, ...handles);
    return [track, text];
  }

  function weight(word) {
    const text = studioElement("output", "times");
    const range = studioElement("input", "weight", `${word}: weight`, {type: "range", min: -2, max: 4, step: .1});
    range.addEventListener("input", () => { set("weights", word, +range.value); update(); });
    updates.push(() => { range.value = settings.weights[word] ?? 1; text.value = `× ${range.value}`; });
    return [range, text];
  }

  function blend(word) {
    const label = studioElement("label", "blend", "", {title: "Change the picture only where this word is"});
    const box = studioElement("input", "", `${word}: blend`, {type: "checkbox"});
    box.addEventListener("change", () => { set("blend", word, box.checked); update(); });
    updates.push(() => { box.checked = settings.blend[word] ?? false; });
    label.append(box, studioElement("span", "label", "", {textContent: "blend"}));
    return [label];
  }

  function reset(name) {
    const button = studioElement("button", "reset", `${name}: as all words`, {textContent: "↺", title: "As all words"});
    button.addEventListener("click", () => {
      const without = part => Object.fromEntries(Object.entries(settings[part]).filter(([word]) => word !== name));
      change({windows: without("windows"), weights: without("weights"), blend: without("blend")});
      update();
    });
    return [button];
  }

  function row(className, name, ...widgets) {
    const line = studioElement("div", `row ${className}`);
    line.append(studioElement("span", "name", "", {textContent: name, title: name}), ...widgets.flat());
    list.append(line);
    return line;
  }

  function setting(name, meaning) {  /* a window of every word, or of self-attention */
    const line = row("setting", name, bar(name, () => settings[name], window => change({[name]: window})));
    line.firstChild.after(studioElement("span", "meaning", "", {textContent: meaning}));
  }

  function presets() {
    const line = list.appendChild(studioElement("div", "presets"));
    for (const {name, title, all, newWords, self} of studioPresets) {
      const button = studioElement("button", "", "", {textContent: name, title});
      button.addEventListener("click", () => {
        const words = newWords === null ? [] : settings.rows.filter(r => r.place === "edit" && !r.is_minor);
        change({
          cross_replace_steps: [0, all], self_replace_steps: [0, self],
          windows: Object.fromEntries(words.map(word => [word.name, [0, newWords]])),
        });
        update();
      });
      line.append(button);
    }
  }

  function word({name, place, is_minor}) {
    const isChanged = () => name in settings.windows || (settings.weights[name] ?? 1) !== 1 || !!settings.blend[name];
    const note = studioElement("span", "note", "", {
      textContent: "only in the source: nothing of the edit to set, but the blend can keep its place"});
    const widgets = place === "source" ? [note, blend(name)] : [
      bar(name, () => settings.windows[name] ?? settings.cross_replace_steps, window => set("windows", name, window)),
      weight(name), blend(name), reset(name)];
    const line = row(`word ${is_minor ? "minor" : ""}`, name, ...widgets);
    updates.push(() => line.classList.toggle("changed", isChanged()));
  }

  function unfold() {  /* a, of, the: seldom worth a row */
    const names = settings.rows.filter(r => r.is_minor).map(r => r.name);
    if (!names.length) return;
    const button = list.appendChild(studioElement("button", "unfold"));
    const show = () => { button.textContent = `${list.classList.contains("unfolded") ? "Hide" : "Show"} ${names.join(", ")}`; };
    button.addEventListener("click", () => { list.classList.toggle("unfolded"); show(); });
    show();
  }

  function draw() {
    list.replaceChildren();
    updates = [];
    if (!settings.rows.length) return;  /* the source alone */
    presets();
    setting("cross_replace_steps", "all words: how long a word looks where the source looks");
    setting("self_replace_steps", "layout: how long things stay where they are in the source");
    const head = row("head", "");
    head.append(...["window", "weight", "blend"].map((name, n) =>
      studioElement("span", ["bar", "weight", "blend"][n], "", {textContent: name})));
    settings.rows.forEach(word);
    unfold();
    update();
  }
  watch("value", () => {  /* rows from the server; what the visitor set stays */
    const {rows} = props.value, isSame = JSON.stringify(rows) === JSON.stringify(settings.rows);
    settings = {...settings, rows};
    props.value = settings;
    if (!isSame) draw();
  });
  draw();
}

/* Four settings of Prompt-to-Prompt's notebook. newWords: the window of the words that only the edited
   prompt has; null gives them that of all words. */
const studioPresets = [
  {name: "swap 0.8 / 0.4", all: .8, newWords: null, self: .4, title: "All words follow the source for 0.8 of the calls, the layout for 0.4"},
  {name: "new word 0.4", all: 1, newWords: .4, self: .4, title: "The new words follow the source for 0.4, all others always"},
  {name: "local 0.2", all: 1, newWords: .2, self: .4, title: "The new words follow the source for 0.2, all others always"},
  {name: "style 0.8 / 0.2", all: .8, newWords: null, self: .2, title: "As swap, with a freer layout: for words that are added"},
];

/* The visitor's picture. It is sent once; props.value holds {key, name}, the key that it got. */
function studioPicture(element, props, trigger) {
  const label = studioElement("label", "upload");
  const file = studioElement("input", "", "", {type: "file", accept: "image/*"});
  const state = studioElement("output", ""), remove = studioElement("button", "", "", {textContent: "Remove", hidden: true});
  function set(value, text) {
    props.value = value;
    state.value = text;
    remove.hidden = !value.key;
    trigger("input");
  }
  file.addEventListener("change", async () => {
    const [chosen] = file.files;
    if (!chosen) return;
    state.value = "Reading …";
    try {
      const answer = await fetch("picture", {method: "POST", body: chosen});
      const {key, error} = await answer.json();
      set(key ? {key, name: chosen.name} : {}, error ?? "");
    } catch { set({}, "The picture was not accepted: it may have at most 10 MB."); }
  });
  remove.addEventListener("click", () => { file.value = ""; set({}, ""); });
  label.append(studioElement("span", "", "", {textContent: "Your own picture, which the prompt describes"}), file);
  element.append(label, remove, state);
}

/* The page in a sandbox: it can run its script, and reach nothing of this page. */
function studioFrame(element, props, trigger, watch) {
  let kept = "{}";  /* what the visitor chose in the last page */
  const frames = () => [...element.querySelectorAll("iframe")];
  addEventListener("message", event => {
    const frame = frames().find(f => f.contentWindow === event.source);
    if (!frame) return;
    kept = JSON.stringify(event.data);
    frame.style.height = `${Math.min(Number(event.data.height) || 0, 20000)}px`;
  });
  function load() {
    const text = props.value.page;
    if (!text) return;
    const next = studioElement("iframe", "coming");
    next.setAttribute("sandbox", "allow-scripts");
    next.title = "The pictures, and where they look";
    next.name = kept;
    next.srcdoc = text.replace("</body>", () => `${studioStyle}<script>(${studioInside})()<\/script></body>`);
    next.addEventListener("load", () => {  /* the old page stays until the new one is drawn */
      frames().slice(0, frames().indexOf(next)).forEach(frame => frame.remove());
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

/* Runs in the page, beside its script: the pinned word, the call and the switch outlive the page. */
function studioInside() {
  const kept = JSON.parse(window.name || "{}");
  pinned = selectAll(".word").find(b => b.dataset.row === kept.row && b.textContent === kept.text) ?? null;
  isMapped = kept.isMapped ?? true;
  go(Math.min(kept.view ?? 0, run.shown.length));
  const report = () => parent.postMessage({
    height: document.documentElement.offsetHeight, view, isMapped, row: pinned?.dataset.row, text: pinned?.textContent,
  }, "*");
  for (const type of ["click", "focusin", "keydown", "input"]) document.addEventListener(type, report);
  new ResizeObserver(report).observe(document.documentElement);
}
