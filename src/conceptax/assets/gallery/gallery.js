"use strict";
(() => {
  const $ = (name) => document.getElementById(name);
  const { page, images } = JSON.parse($("gallery").textContent);
  const labels = page.runs.length > 1 ? page.runs.map((run) => run.label) : [page.sides[1]];
  const many = labels.length > 1;
  const scenes = page.kind === "segmentation";
  const AT_ONCE = 48;
  const state = { group: "", concept: "", judged: "", seed: "", find: "", view: "", pair: "" };
  let chosen = []; // places of the items that the filters leave
  let shown = 0; // how many of them have cards

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  // --- images, which are loaded when they come near ---

  function address(key) {
    if (!Object.hasOwn(images, key)) return null;
    const within = images[key];
    return within === null ? `report-images/${key}.webp` : `data:image/webp;base64,${within}`;
  }

  const near = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      target.src = address(target.dataset.key);
    }
  }, { rootMargin: "400px" });

  const missing = () => make("span", { class: "missing" }, "image missing");

  function picture(shot, what) {
    if (address(shot.image) === null) return missing();
    const image = make("img", { alt: what, "data-key": shot.image, decoding: "async" });
    image.draggable = false;
    image.addEventListener("error", () => image.replaceWith(missing()));
    near.observe(image);
    return image;
  }

  // --- one item ---

  const shape = (item) => `aspect-ratio: ${Number(item.size[0])} / ${Number(item.size[1])}`;

  function alone(item, shot, name) {
    const frame = make("span", { class: "picture", style: shape(item) });
    frame.append(picture(shot, `${name}: ${item.prompt}`));
    frame.append(make("b", { class: "name" }, name));
    return frame;
  }

  function slider(item, before, after, name) {
    const frame = make("span", { class: "picture slider", style: `${shape(item)}; --at: 50%` });
    const over = make("span", { class: "over" }, picture(before, `${page.sides[0]}: ${item.prompt}`));
    const range = make("input", {
      type: "range", min: 0, max: 100, value: 50,
      "aria-label": `How much of ${page.sides[0]} is shown beside ${name}: ${item.prompt}`,
    });
    range.addEventListener("input", () => frame.style.setProperty("--at", `${range.value}%`));
    frame.append(
      picture(after, `${name}: ${item.prompt}`), over, make("span", { class: "edge" }),
      make("b", { class: "name" }, page.sides[0]), make("b", { class: "name" }, name), range,
    );
    return frame;
  }

  function verdict(item, shot, name, named) {
    const said = [];
    let look = "";
    if (shot.shown !== undefined) {
      const wrong = shot.shown === (page.groups[item.group].kind === "attack");
      look = wrong ? " bad" : " good";
      said.push(shot.shown ? "✓ shows it" : "✗ does not");
    }
    if (shot.word) {
      const sure = shot.confidence === undefined ? "" : `\u00a0${percent(shot.confidence)}`;
      said.push(`${shot.word}${sure}`);
    }
    if (shot.told) said.push(shot.told);
    if (!said.length) return null;
    const line = make("li", { "aria-label": name });
    if (named) line.append(make("span", { class: "who" }, name));
    line.append(make("span", { class: `said${look}` }, said.join(" · ")));
    if (wordings(item).size > 1) {
      line.append(make("span", { class: "own" }, `asked by “${shot.prompt}”`));
    }
    return line;
  }

  const percent = (share) => `${(100 * share).toFixed(share > 0.995 && share < 1 ? 1 : 0)}\u00a0%`;

  function tile(frame, lines) {
    const verdicts = make("ul", { class: "verdicts" }, ...lines.filter(Boolean));
    return make("div", { class: "tile" }, frame, ...(verdicts.childElementCount ? [verdicts] : []));
  }

  function stage(item) {
    const { before } = item;
    const tiles = [];
    const drawn = item.after.some(Boolean);
    const apart = state.view === "side" || !before || !drawn;
    const first = before && verdict(item, before, page.sides[0], !apart);
    if (before && apart) tiles.push(tile(alone(item, before, page.sides[0]), [first]));
    item.after.forEach((shot, run) => {
      if (!shot) {
        if (many && drawn) {
          const frame = make("span", { class: "picture", style: shape(item) });
          frame.append(make("span", { class: "missing" }, `not drawn by ${labels[run]}`));
          tiles.push(tile(frame, []));
        }
        return;
      }
      const frame = apart ? alone(item, shot, labels[run]) : slider(item, before, shot, labels[run]);
      const own = verdict(item, shot, labels[run], !apart && !many);
      tiles.push(tile(frame, apart || many ? [own] : [first, own]));
    });
    const box = [make("div", { class: "stage", style: `--tiles: ${tiles.length}` }, ...tiles)];
    if (many && before && !apart && first) box.push(make("ul", { class: "verdicts" }, first));
    return box;
  }

  const wordings = (item) => new Set(item.after.filter((shot) => shot?.prompt).map((shot) => shot.prompt));
  const asked = (item) => (wordings(item).size > 1 ? "each in words of its own" : item.prompt);

  function meta(item) {
    const parts = [page.groups[item.group].title, ...item.concepts.slice(0, 6)];
    if (item.concepts.length > 6) parts.push(`and ${item.concepts.length - 6} more`);
    if (item.seed !== undefined) parts.push(`seed ${item.seed}, image ${item.number}`);
    return [...new Set(parts)].join(" · ");
  }

  function card(place, large = false) {
    const item = page.items[place];
    const button = make("button", { type: "button", "aria-label": `Enlarge: ${item.prompt}` }, "Enlarge");
    button.addEventListener("click", () => enlarge(place));
    return make(
      "article", { class: "card", "data-place": place },
      ...stage(item), make("p", { class: "prompt" }, large ? asked(item) : short(asked(item))),
      make("p", { class: "meta" }, make("span", {}, meta(item)), button),
    );
  }

  const short = (text) => (text.length > 180 ? `${text.slice(0, 178)} …` : text);

  // --- in front ---

  function front() {
    for (const [n, { title, items }] of page.front.entries()) {
      const row = make("div", { class: page.front.length > 1 ? "row" : "row wide" });
      for (const item of items.map((place) => page.items[place])) {
        const figure = make("figure", {}, make("figcaption", {}, short(item.prompt)));
        if (item.before) figure.append(alone(item, item.before, page.sides[0]));
        item.after.forEach((shot, run) => shot && figure.append(alone(item, shot, labels[run])));
        row.append(figure);
      }
      const heading = make("h2", { id: `front-${n}` }, title);
      $("front").append(make("section", { "aria-labelledby": heading.id }, heading, row));
    }
  }

  // --- filters, which the address holds ---

  const JUDGED = {
    shown: [many ? "shown by some" : `${labels[0]} shows it`, (own) => own.includes(true)],
    not: [many ? "shown by none" : `${labels[0]} does not`, (own) => own.every((each) => !each)],
    changed: [
      `otherwise than ${page.sides[0]}`,
      (own, item) => item.before?.shown !== undefined && own.some((e) => e !== item.before.shown),
    ],
    differ: ["otherwise by one than another", (own) => new Set(own).size > 1],
  };

  function judged(item) {
    const own = item.after.filter((shot) => shot?.shown !== undefined).map((shot) => shot.shown);
    return own.length > 0 && JUDGED[state.judged][1](own, item);
  }

  function left(item) {
    return (
      (!state.group || page.groups[item.group].name === state.group) &&
      (!state.concept || item.concepts.includes(state.concept)) &&
      (!state.seed || String(item.seed) === state.seed) &&
      (!state.judged || judged(item)) &&
      (!state.find || words(item).includes(state.find.toLowerCase()))
    );
  }

  const words = (item) =>
    [item.prompt, ...item.after.map((shot) => shot?.prompt ?? "")].join("\n").toLowerCase();

  function options(name, all, values) {
    const select = $(name);
    select.append(new Option(all, ""), ...values.map(([value, text]) => new Option(text, value)));
    if (!values.length || (name === "group" && values.length < 2)) {
      select.closest("label").hidden = true;
    }
  }

  function count(values) {
    const found = new Map();
    for (const value of values) found.set(value, (found.get(value) ?? 0) + 1);
    return [...found];
  }

  function filters() {
    const groups = count(page.items.map((item) => page.groups[item.group].name));
    const titles = new Map(page.groups.map((group) => [group.name, group.title]));
    options("group", "anything", groups.map(([name, n]) => [name, `${titles.get(name)} (${n})`]));
    const concepts = count(page.items.flatMap((item) => item.concepts));
    options("concept", "anything", concepts.map(([name, n]) => [name, `${name} (${n})`]));
    const seeds = count(page.items.map((item) => item.seed).filter((seed) => seed !== undefined));
    options("seed", "any", seeds.map(([seed, n]) => [String(seed), `${seed} (${n})`]));
    const asked = page.items.some((item) => item.after.some((shot) => shot?.shown !== undefined));
    const ways = Object.entries(JUDGED).filter(([name]) => many || name !== "differ");
    options("judged", "either way", asked ? ways.map(([name, [text]]) => [name, text]) : []);
    if (scenes) [$("about").textContent, $("where").textContent] = ["With", "In the name"];
    const pairs = page.items.some((item) => item.before && item.after.some(Boolean));
    for (const name of ["view", "all"]) $(name).closest("label").hidden = !pairs;
  }

  function write() {
    const given = Object.entries(state).filter(([, value]) => value !== "");
    const address = new URLSearchParams(given).toString();
    history.replaceState(null, "", address ? `#${address}` : location.pathname + location.search);
  }

  function read() {
    const text = location.hash.slice(1);
    if (text && !text.includes("=")) return false; // a place on the page
    const given = new URLSearchParams(text);
    for (const name of Object.keys(state)) {
      const value = given.get(name) ?? "";
      const field = $(name);
      const known = !field?.options || [...field.options].some((one) => one.value === value);
      state[name] = known ? value : "";
      if (field) field.value = state[name];
    }
    return true;
  }

  // --- the list ---

  function more() {
    const next = chosen.slice(shown, shown + AT_ONCE);
    $("cards").append(...next.map((place) => card(place)));
    shown += next.length;
    $("more").hidden = shown === chosen.length;
  }

  function list() {
    chosen = page.items.map((_, place) => place).filter((place) => left(page.items[place]));
    shown = 0;
    near.disconnect();
    for (const image of document.querySelectorAll("#front img:not([src])")) near.observe(image);
    $("cards").replaceChildren();
    $("all").value = 50;
    const [all, now] = [page.items.length, chosen.length].map((n) => n.toLocaleString("en"));
    const drawn = new Set(chosen.flatMap((place) => {
      const item = page.items[place];
      return [item.before, ...item.after].filter(Boolean).map((shot) => shot.image);
    }));
    const number = `${drawn.size.toLocaleString("en")} images`;
    const what = drawn.size === chosen.length ? "images" : `${scenes ? "scenes" : "prompts"}, ${number}`;
    $("count").textContent = chosen.length
      ? `${now === all ? all : `${now} of ${all}`} ${what}`
      : "Nothing is so: take fewer filters.";
    more();
  }

  // --- one of them, large ---

  function enlarge(place) {
    state.pair = String(place);
    write();
    $("one").replaceChildren(card(place, true));
    const at = chosen.indexOf(place);
    $("previous").disabled = at <= 0;
    $("next").disabled = at < 0 || at === chosen.length - 1;
    if (!$("large").open) $("large").showModal();
    ($("one").querySelector("input") ?? $("close")).focus();
  }

  function step(by) {
    const place = chosen[chosen.indexOf(Number(state.pair)) + by];
    if (place !== undefined) enlarge(place);
  }

  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("close").addEventListener("click", () => $("large").close());
  $("large").addEventListener("close", () => {
    document.querySelector(`#cards [data-place="${Number(state.pair)}"] button`)?.focus();
    state.pair = "";
    write();
  });
  $("large").addEventListener("click", (event) => {
    if (event.target === $("large")) $("large").close();
  });

  // --- light and dark, and copying ---

  const THEMES = { "": "Light or dark", light: "Light", dark: "Dark" };

  function theme(name) {
    if (name) document.documentElement.dataset.theme = name;
    else delete document.documentElement.dataset.theme;
    $("theme").textContent = { "": "◐", light: "☀", dark: "☾" }[name];
    $("theme").title = $("theme").ariaLabel = `Colors: ${name ? THEMES[name] : "as the system"}`;
    $("theme").value = name;
    try {
      localStorage.setItem("conceptax-theme", name);
    } catch {} // where nothing may be stored
  }

  let kept = "";
  try {
    kept = localStorage.getItem("conceptax-theme") ?? "";
  } catch {}
  theme(kept in THEMES ? kept : "");
  $("theme").addEventListener("click", () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const order = dark ? ["", "light", "dark"] : ["", "dark", "light"];
    theme(order[(order.indexOf($("theme").value) + 1) % 3]);
  });

  async function copy(button, text) {
    const before = button.textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not copied";
    }
    setTimeout(() => (button.textContent = before), 1500);
  }

  $("link").addEventListener("click", () => copy($("link"), location.href));
  for (const snippet of document.querySelectorAll(".snippet")) {
    const button = snippet.querySelector("button");
    button.addEventListener("click", () => copy(button, snippet.querySelector("code").textContent));
  }

  // --- begin ---

  for (const name of ["group", "concept", "judged", "seed", "find", "view"]) {
    $(name).addEventListener("input", () => {
      state[name] = $(name).value.trim();
      write();
      list();
    });
  }
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("all").addEventListener("input", () => {
    for (const range of document.querySelectorAll("#cards .slider input")) {
      range.value = $("all").value;
      range.dispatchEvent(new Event("input"));
    }
  });
  $("more").addEventListener("click", more);
  new IntersectionObserver(([{ isIntersecting }]) => isIntersecting && shown && more(), {
    rootMargin: "600px",
  }).observe($("more"));

  function arrive() {
    if (!read()) return;
    list();
    const place = Number(state.pair);
    if (state.pair !== "" && page.items[place]) enlarge(place);
    else if ($("large").open) $("large").close();
  }

  filters();
  front();
  $("cards").classList.toggle("many", many);
  if (many) {
    $("cards").style.setProperty("--card-width", `${Math.min(labels.length, 4) * 11}rem`);
  }
  if (!read()) list();
  else arrive();
  addEventListener("hashchange", arrive);
  document.documentElement.dataset.ready = "yes";
})();
