// The explorer's page: settings, which the address holds, and what the simulator says of them.
"use strict";

(() => {
  const simulator = createSimulator(CONSTANTS);
  const { by, product } = simulator;
  const { gpus, models, presets, rates } = CONSTANTS;

  // What the page takes: more would keep a browser busy for seconds.
  const MOST = { tokens: 2 ** 22, blocks: 2 ** 22, runs: 3e8, strides: 3e7, products: 2 ** 18 };
  const MOST_SLICES = 60;
  const TIMES = "×";

  const find = (id) => document.getElementById(id);
  const isSvg = (tag) => ["svg", "g", "line", "circle", "text", "title"].includes(tag);

  // An element with attributes, listeners among them, and children.
  function make(tag, attributes = {}, ...children) {
    const made = isSvg(tag)
      ? document.createElementNS("http://www.w3.org/2000/svg", tag)
      : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value === true) made.setAttribute(name, "");
      else if (value !== false && value !== undefined) made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }

  const number = (value) => value.toLocaleString("en-US");
  const fixed = (value, digits = 2) =>
    value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  const times = (value) => `${fixed(value)}${TIMES}`;
  const percent = (value, digits = 1) => `${fixed(100 * value, digits)} %`;
  const milliseconds = (seconds) => {
    const ms = 1e3 * seconds;
    return `${fixed(ms, ms < 1 ? 4 : ms < 10 ? 3 : ms < 100 ? 2 : 1)} ms`;
  };
  const onGpu = (name) => `on ${/^[ah]/.test(name) ? "an" : "a"} ${name.toUpperCase()}`;
  const duration = (seconds) =>
    seconds < 10
      ? `${fixed(seconds)} s`
      : seconds < 100
        ? `${fixed(seconds, 1)} s`
        : `${number(Math.round(seconds))} s`;

  // ---- settings ----

  const PER_DIMENSION = ["layout", "window", "stride", "dilation"];
  const CALL = {
    heads: "heads",
    kvHeads: "KV heads",
    headDim: "head dim",
    batch: "batch",
    additional: "text tokens",
  };
  const MODEL = { steps: "steps", denseSteps: "of these dense", share: "attention, % of run" };
  const OPTIONS = { tiling: ["permuted", "fused", "single-dim"], gpu: Object.keys(gpus) };

  const each = (value, rank) => (Array.isArray(value) ? [...value] : Array(rank).fill(value));

  // The settings of a preset, on a GPU.
  function settingsOf(name, gpu) {
    const preset = presets[name];
    const model = models[preset.model];
    const rank = preset.layout.length;
    return {
      preset: name,
      layout: [...preset.layout],
      window: each(preset.window, rank),
      stride: each(preset.stride, rank),
      dilation: Array(rank).fill(1),
      causal: Array(rank).fill(false),
      queryTile: null,
      keyTile: null,
      tiling: "permuted",
      maskEveryTile: false,
      gpu,
      ...callOf(model),
      steps: preset.steps,
      denseSteps: preset.denseSteps,
      share: Math.round(1e3 * (preset.attentionShare ?? 0.5)) / 10,
      query: preset.layout.map((length) => Math.floor(length / 2)),
    };
  }

  const callOf = (model) => ({
    heads: model.heads,
    kvHeads: model.heads,
    headDim: model.headDim,
    batch: 1,
    additional: model.joint ? model.text : 0,
    additionalQueries: model.joint,
  });

  const FIRST = settingsOf("hunyuan", "h200");
  let state = structuredClone(FIRST);

  // The settings as the address has them, short names and one text each.
  const FIELDS = {
    layout: "sizes",
    window: "sizes",
    stride: "sizes",
    dilation: "sizes",
    causal: "bools",
    queryTile: "tile",
    keyTile: "tile",
    tiling: "option",
    maskEveryTile: "bool",
    gpu: "option",
    heads: "number",
    kvHeads: "number",
    headDim: "number",
    batch: "number",
    additional: "number",
    additionalQueries: "bool",
    steps: "number",
    denseSteps: "number",
    share: "number",
    query: "sizes",
  };

  const WRITE = {
    sizes: (value) => by(value),
    tile: (value) => (value ? by(value) : ""),
    bools: (value) => value.map(Number).join(""),
    bool: (value) => String(Number(value)),
    option: (value) => value,
    number: (value) => String(value),
  };

  function written() {
    const told = Object.entries(FIELDS)
      .filter(([name]) => state[name] !== null)
      .map(([name, kind]) => `${name}=${WRITE[kind](state[name])}`);
    return `#${[`preset=${state.preset || "own"}`, ...told].join("&")}`;
  }

  const sizes = (text) => (/^\d+(x\d+){0,2}$/.test(text) ? text.split("x").map(Number) : undefined);
  const READ = {
    sizes,
    tile: sizes,
    bools: (text) =>
      /^[01]{1,3}$/.test(text) ? [...text].map((letter) => letter === "1") : undefined,
    bool: (text) => ({ 0: false, 1: true })[text],
    option: (text, name) => (OPTIONS[name].includes(text) ? text : undefined),
    number: (text) => (/^\d+(\.\d+)?$/.test(text) ? Number(text) : undefined),
  };

  // Settings from an address; what cannot be read is told, and stays as the preset has it.
  function read(hash) {
    const given = new URLSearchParams(hash.replace(/^#/, ""));
    const name = given.get("preset") ?? FIRST.preset;
    const unread = [];
    if (!(name in presets) && name !== "own") unread.push("preset");
    const next = settingsOf(name in presets ? name : FIRST.preset, FIRST.gpu);
    next.preset = name in presets ? name : "";
    for (const [field, kind] of Object.entries(FIELDS)) {
      if (!given.has(field)) continue;
      const value = READ[kind](given.get(field), field);
      if (value === undefined) unread.push(field);
      else next[field] = value;
    }
    const rank = next.layout.length;
    for (const field of [...PER_DIMENSION, "causal", "query"]) {
      if (next[field].length !== rank) {
        if (given.has(field)) unread.push(field);
        next[field] = fitted(field, next[field], rank, next.layout);
      }
    }
    const tiled = next.tiling === "single-dim" ? 1 : rank;
    const [q, k] = [next.queryTile, next.keyTile];
    if ((q || k) && !(q?.length === tiled && k?.length === tiled)) {
      unread.push("queryTile");
      next.queryTile = next.keyTile = null;
    }
    if (next.preset && presets[next.preset].layout.length !== rank) next.preset = "";
    if (next.preset) Object.assign(next, callOf(models[presets[next.preset].model]));
    next.query = next.query.map((x, m) => Math.min(x, Math.max(next.layout[m] - 1, 0)));
    return { next, unread };
  }

  // A setting for another number of dimensions: the last ones stay.
  function fitted(field, values, rank, layout) {
    if (field === "query") return layout.map((length) => Math.floor(length / 2));
    const filler = { layout: 16, window: 8, stride: 1, dilation: 1, causal: false }[field];
    const kept = values.slice(-rank);
    return [...Array(rank - kept.length).fill(filler), ...kept];
  }

  // ---- what cannot be ----

  const whole = (value, least) => Number.isInteger(value) && value >= least;

  const LABELS = {
    layout: "tokens",
    queryTile: "query tile",
    keyTile: "key tile",
    ...CALL,
    ...MODEL,
  };

  // The first field that is no number that it takes, [name, dimension], and a sentence.
  function wrongNumber() {
    const asked = [...PER_DIMENSION, "queryTile", "keyTile"].filter((name) => state[name]);
    for (const name of asked) {
      const m = state[name].findIndex((value) => !whole(value, 1));
      if (m >= 0) return [name, m, "a whole number of at least 1"];
    }
    for (const name of Object.keys(CALL)) {
      const least = name === "additional" ? 0 : 1;
      if (!whole(state[name], least)) return [name, null, `a whole number of at least ${least}`];
    }
    if (!whole(state.steps, 1)) return ["steps", null, "a whole number of at least 1"];
    if (!whole(state.denseSteps, 0) || state.denseSteps > state.steps) {
      return ["denseSteps", null, `a whole number from 0 to the steps, ${state.steps}`];
    }
    if (!(state.share >= 0 && state.share <= 100)) return ["share", null, "a number from 0 to 100"];
    return null;
  }

  // Why there is nothing to show, in a sentence; empty where there is.
  function refusal() {
    const wrong = wrongNumber();
    if (wrong) {
      const [name, m, takes] = wrong;
      const value = m === null ? state[name] : state[name][m];
      const where = m === null ? "" : ` in dimension ${m}`;
      return (
        `${LABELS[name] ?? name} takes ${takes}${where}; received ` +
        `${Number.isNaN(value) ? "nothing" : number(value)}.`
      );
    }
    if (state.heads % state.kvHeads) {
      return `heads must be a multiple of KV heads; received ${state.heads} and ${state.kvHeads}.`;
    }
    const misfit = simulator.misfit(state);
    if (misfit) return misfit;
    const tokens = product(state.layout) + state.additional;
    if (tokens > MOST.tokens) {
      return (
        `this page takes up to ${number(MOST.tokens)} tokens, received ${number(tokens)}; ` +
        "`conceptax gna simulate` takes more."
      );
    }
    const smallest = Math.min(...tileShapes().map(([query]) => product(query)));
    const blocks = (2 ** state.layout.length * tokens * state.batch * state.heads) / smallest;
    if (blocks > MOST.blocks) {
      return (
        "these are too many blocks to schedule here; take larger query tiles, fewer heads or a " +
        "smaller batch, or `conceptax gna simulate`."
      );
    }
    const last = state.layout.at(-1);
    const boxes = (tokens / smallest) * (Math.ceil(smallest / last) + 1) * product(state.window);
    const whole = state.dilation.at(-1) === 1 ? state.window.at(-1) : 1;
    const runs = boxes / whole + tokens * state.window.at(-1);
    if (state.tiling === "single-dim" && runs > MOST.runs) {
      return (
        "runs of flattened tokens take too long to count here; take a smaller window or boxes, " +
        "or `conceptax gna simulate`."
      );
    }
    return "";
  }

  function tileShapes() {
    if (state.queryTile) return [[state.queryTile, state.keyTile]];
    const rank = state.tiling === "single-dim" ? 1 : state.layout.length;
    return Object.values(gpus).flatMap((gpu) => gpu.tiles[rank]);
  }

  // ---- what the simulator says ----

  function simulated(gpu) {
    const settings = { ...state, gpu };
    if (!state.preset) return { call: simulator.simulate(settings), model: null };
    const model = simulator.simulateModel(state.preset, settings, state.steps, state.denseSteps);
    return { call: model.withText, model };
  }

  const unchanged = (name) => {
    const preset = presets[state.preset];
    return Boolean(preset) && by(state[name]) === by(each(preset[name], state.layout.length));
  };

  function adviceOf(call) {
    const plain = state.dilation.every((d) => d === 1) && !state.causal.includes(true);
    if (!plain || state.tiling !== "permuted") return "";
    const name = unchanged("window") && unchanged("stride") ? state.preset : "";
    const model = state.preset ? models[presets[state.preset].model] : null;
    return simulator.advice(state, call.queryTile, call.keyTile, name, model);
  }

  // Rebuilds a part without losing the focus in it.
  function keepingFocus(id, rebuild) {
    const buttons = () => [...find(id).querySelectorAll("button, [role=button]")];
    const at = buttons().indexOf(document.activeElement);
    rebuild();
    if (at >= 0) buttons()[at]?.focus();
  }

  // ---- drawing: figures and tables ----

  // A sentence, its `code` set as code.
  function say(id, text) {
    const parts = (text && text[0].toUpperCase() + text.slice(1)).split("`");
    find(id).replaceChildren(...parts.map((part, n) => (n % 2 ? make("code", {}, part) : part)));
    find(id).hidden = !text;
  }

  function showFigures(call) {
    const text = state.additional ? `, ${number(state.additional)} text tokens included` : "";
    const apart = state.additional && state.additionalQueries ? ", text queries apart" : "";
    const cards = [
      [
        "Pairs: the bound",
        times(call.flopSpeedup),
        `${percent(call.sparsity)} of the pairs do not attend${text}`,
      ],
      [
        "Mean query tile",
        times(call.tileSpeedup),
        `visits ${fixed(call.meanVisits, 1)} of ${number(call.allVisits)} key tiles`,
      ],
      [
        "Worst query tile",
        times(call.worstTileSpeedup),
        `visits ${number(call.worstVisits)} of ${number(call.allVisits)} key tiles${apart}`,
      ],
      [
        "Masks",
        call.blockSparse && call.freeShare === 1 ? "none" : percent(1 - call.freeShare),
        call.blockSparse && call.freeShare === 1
          ? "block-sparse: every visited tile is seen whole"
          : "of the visited tiles need one",
      ],
      [
        `Kernel on ${state.gpu.toUpperCase()}`,
        times(call.waveSpeedup),
        `${milliseconds(call.seconds)} for ${milliseconds(call.denseSeconds)} dense`,
      ],
    ];
    find("figures").replaceChildren(
      ...cards.map(([name, value, note]) =>
        make(
          "div",
          {},
          make("dt", {}, name),
          make("dd", { class: "value" }, value),
          make("dd", { class: "note" }, note),
        ),
      ),
    );
  }

  const headed = (...names) =>
    make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name))));

  function showTimes(answers) {
    const rows = Object.entries(answers).map(([name, { call }]) => {
      const chosen = name === state.gpu;
      const button = make(
        "button",
        {
          type: "button",
          "aria-pressed": String(chosen),
          onclick: () => change({ gpu: name }),
        },
        name.toUpperCase(),
      );
      const cells = [
        milliseconds(call.seconds),
        milliseconds(call.denseSeconds),
        times(call.waveSpeedup),
        call.permutation ? times(call.speedup) : "–",
        number(call.waves),
        `${by(call.queryTile, TIMES)} / ${by(call.keyTile, TIMES)}`,
      ];
      return make(
        "tr",
        chosen ? { class: "chosen" } : {},
        make("th", { scope: "row" }, button),
        ...cells.map((cell) => make("td", {}, cell)),
      );
    });
    find("times").replaceChildren(
      headed("GPU", "sparse", "dense", "speed-up", "and permutation", "waves", "query / key tile"),
      make("tbody", {}, ...rows),
    );
  }

  function showModel({ call, model }) {
    const steps = `${state.denseSteps} of ${state.steps} steps dense`;
    const table = find("whole");
    if (!model) {
      const share = state.share / 100;
      const replaced = 1 - state.denseSteps / state.steps;
      const end = (part) => times(simulator.endToEnd(call, share, part));
      find("whole-told").textContent =
        `Where attention takes ${fixed(state.share, 1)} % of the dense ` +
        `run ${onGpu(state.gpu)}, all of it runs ${end(1)} as fast if all steps are ` +
        `sparse, and ${end(replaced)} with ${steps}, permutation on each call included.`;
      find("rates").textContent = "Start from a model for what follows from its operations.";
      table.replaceChildren();
      return;
    }
    const size = simulator.sizeOf(model.model, state.layout);
    const { forward, sample } = model;
    find("whole-told").textContent =
      `${model.preset.model}, ${size}, ${onGpu(state.gpu)}: ` +
      `a forward pass takes ${duration(forward.dense)} dense and ` +
      `${duration(forward.sparse)} sparse; a sample takes ${duration(sample.dense)} dense, ` +
      `${duration(sample.afterDenseSteps)} with ${steps} and ${duration(sample.allSteps)} with all ` +
      "steps sparse, without VAE and text encoders.";
    const known = Object.keys(model.shares).reverse();
    const titles = { published: "whole run, B200, published", rates: "transformer, by the rates" };
    const head = make(
      "thead",
      {},
      make(
        "tr",
        {},
        make("th", { rowspan: 2, scope: "col" }, "counted by"),
        make("th", { rowspan: 2, scope: "col" }, "attention"),
        ...known.map((name) =>
          make(
            "th",
            { colspan: 2, scope: "colgroup" },
            titles[name],
            make("br"),
            `attention is ${percent(model.shares[name])}`,
          ),
        ),
      ),
      make(
        "tr",
        {},
        ...known.flatMap(() =>
          ["all sparse", steps.replace(" steps", "")].map((name) =>
            make("th", { scope: "col" }, name),
          ),
        ),
      ),
    );
    const groups = { imageAlone: "image alone", withText: "with text" };
    const body = make("tbody");
    for (const [key, title] of Object.entries(groups)) {
      if (key === "withText" && !model.model.joint) continue;
      if (model.model.joint) {
        body.append(
          make(
            "tr",
            { class: "group" },
            make("th", { colspan: 2 + 2 * known.length, scope: "rowgroup" }, title),
          ),
        );
      }
      for (const row of model.rows.filter((one) => one.tokens === key)) {
        body.append(
          make(
            "tr",
            {},
            make("th", { scope: "row" }, row.counted),
            make("td", {}, times(row.speedup)),
            ...known.flatMap((name) =>
              [row.endToEnd[name].allSteps, row.endToEnd[name].afterDenseSteps].map((value) =>
                make("td", {}, times(value)),
              ),
            ),
          ),
        );
      }
    }
    table.replaceChildren(head, body);
    const told = (what, rate) =>
      `${what} ${number(rate.flops / 1e12)} TFLOP/s, ${rate.basis} ` + `(${rate.source})`;
    const { linear, attention } = rates[state.gpu];
    find("rates").textContent =
      `Rates: ${told("linear layers", linear)}; ` + `${told("dense attention", attention)}.`;
  }

  // ---- drawing: the map ----

  const color = (name) =>
    getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  function bytesOf(text) {
    const value = parseInt(text.slice(1), 16);
    return [value >> 16, (value >> 8) & 255, value & 255];
  }

  let map = null; // what is drawn: where slices lie, and how large a token is

  // The tokens as planes of rows and columns, one for each token along the first of 3 dimensions.
  function planes() {
    const [columns, rows = 1, count = 1] = [...state.layout].reverse();
    const first = Math.min(
      Math.max(state.query[0] - MOST_SLICES / 2, 0),
      Math.max(count - MOST_SLICES, 0),
    );
    return {
      columns,
      rows,
      count,
      first: count > 1 ? first : 0,
      shown: Math.min(count, MOST_SLICES),
    };
  }

  function arrange(width) {
    const plane = planes();
    const label = plane.count > 1 ? 15 : 0;
    const gap = 8;
    let best = null;
    const most = plane.count > 1 ? Math.max(1, Math.floor(width / 96)) : 1;
    for (let across = 1; across <= Math.min(most, plane.shown); across++) {
      const wide = (width - gap * (across - 1)) / across;
      const scale = Math.min(wide / plane.columns, plane.count > 1 ? 4 : 24, 620 / plane.rows);
      const high = plane.rows === 1 ? Math.max(scale, 56) : scale * plane.rows;
      const down = Math.ceil(plane.shown / across);
      const height = down * (high + label + gap);
      // As large as fits a screen.
      if (best === null || height <= 560 || height < best.height) {
        if (best === null || best.height > 560) best = { across, scale, high, height };
      }
    }
    return { ...plane, ...best, label, gap, wide: best.scale * plane.columns };
  }

  const corner = (n) => {
    const place = n - map.first;
    return [
      (place % map.across) * (map.wide + map.gap),
      Math.floor(place / map.across) * (map.high + map.label + map.gap) + map.label,
    ];
  };

  function drawMap(call) {
    const canvas = find("map");
    const width = canvas.clientWidth;
    if (!width) return;
    map = { ...arrange(width), call };
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(map.height * ratio);
    canvas.style.height = `${map.height}px`;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const around = simulator.around(state, state.query, call.queryTile, call.keyTile);
    const colors = Object.fromEntries(
      ["skipped", "free", "masked", "wasted", "query", "ink", "quiet", "card"].map((name) => [
        name,
        color(name),
      ]),
    );
    const painted = ["skipped", "free", "wasted", "skipped", "skipped", "free", "masked"].map(
      (name) => bytesOf(colors[name]),
    );
    const red = bytesOf(colors.query);
    const boxed = state.tiling !== "single-dim" && state.dilation.every((d) => d === 1);
    const tile = new OffscreenCanvas(map.columns, map.rows);
    const area = map.columns * map.rows;
    const slice = state.layout.length > 2 ? state.query[0] : 0;
    for (let n = map.first; n < map.first + map.shown; n++) {
      const image = new ImageData(map.columns, map.rows);
      for (let at = 0; at < area; at++) {
        const kind = around.tokens[n * area + at];
        const paint = painted[kind & 7];
        const own = !boxed && kind & 8;
        for (let c = 0; c < 3; c++) {
          image.data[4 * at + c] = own ? (paint[c] + 3 * red[c]) / 4 : paint[c];
        }
        image.data[4 * at + 3] = 255;
      }
      tile.getContext("2d").putImageData(image, 0, 0);
      const [x, y] = corner(n);
      context.imageSmoothingEnabled = map.scale < 1;
      context.drawImage(tile, x, y, map.wide, map.high);
      if (map.label) {
        context.font = `${n === slice ? "600 " : ""}11px system-ui, sans-serif`;
        context.fillStyle = n === slice ? colors.ink : colors.quiet;
        context.fillText(String(n), x, y - 4);
      }
    }
    if (state.tiling === "permuted" && boxed) drawGrid(context, call.keyTile, colors.card);
    if (boxed) drawTile(context, call.queryTile, colors.query);
    const [x, y] = pixel(state.query);
    const side = Math.max(map.scale, 5);
    context.fillStyle = colors.query;
    context.strokeStyle = colors.card;
    context.lineWidth = 1.5;
    const high = map.rows === 1 ? map.high : side;
    context.fillRect(x - side / 2, map.rows === 1 ? y - high / 2 : y - side / 2, side, high);
    context.strokeRect(x - side / 2, map.rows === 1 ? y - high / 2 : y - side / 2, side, high);
    tell(around);
  }

  const rowsHigh = () => map.high / map.rows;

  // The middle of a token.
  function pixel(query) {
    const [column, row = 0] = [...query].reverse();
    const [x, y] = corner(state.layout.length > 2 ? query[0] : 0);
    return [x + (column + 0.5) * map.scale, y + (row + 0.5) * rowsHigh()];
  }

  function drawGrid(context, keyTile, stroke) {
    const [wide, high = 1] = [...keyTile].reverse();
    if (wide * map.scale < 6 || (map.rows > 1 && high * map.scale < 6)) return;
    context.strokeStyle = stroke;
    context.lineWidth = 1;
    context.globalAlpha = 0.55;
    context.beginPath();
    for (let n = map.first; n < map.first + map.shown; n++) {
      const [x, y] = corner(n);
      for (let column = wide; column < map.columns; column += wide) {
        context.moveTo(x + column * map.scale, y);
        context.lineTo(x + column * map.scale, y + map.high);
      }
      for (let row = high; row < map.rows; row += high) {
        context.moveTo(x, y + row * map.scale);
        context.lineTo(x + map.wide, y + row * map.scale);
      }
    }
    context.stroke();
    context.globalAlpha = 1;
  }

  function drawTile(context, queryTile, stroke) {
    const [first, last] = [0, 1].map((end) =>
      state.query.map((x, m) => {
        const tile = Math.floor(x / queryTile[m]) + end;
        return Math.min(tile * queryTile[m], state.layout[m]);
      }),
    );
    const [columns, rows = [0, 1]] = first.map((x, m) => [x, last[m]]).reverse();
    const slices = state.layout.length > 2 ? [first[0], last[0]] : [0, 1];
    context.strokeStyle = stroke;
    context.lineWidth = 2;
    for (
      let n = Math.max(slices[0], map.first);
      n < Math.min(slices[1], map.first + map.shown);
      n++
    ) {
      const [x, y] = corner(n);
      context.strokeRect(
        x + columns[0] * map.scale,
        y + rows[0] * rowsHigh(),
        (columns[1] - columns[0]) * map.scale,
        (rows[1] - rows[0]) * rowsHigh(),
      );
    }
  }

  function tell({ keys, visited, free }) {
    const text = state.additional ? `, and ${number(state.additional)} text tokens` : "";
    const masked = visited - free;
    find("told").textContent =
      `Query (${state.query.join(", ")}) sees ${number(keys)} of ` +
      `${number(product(state.layout))} keys${text}. Its tile visits ${number(visited)} key tiles: ` +
      `${number(free)} without a mask, ${number(masked)} masked.`;
  }

  function showLegend() {
    const names = {
      free: "seen, in a key tile without a mask",
      masked: "seen, in a masked key tile",
      wasted: "computed, then masked away",
      skipped: "not visited",
      query: "the query and its tile",
    };
    find("legend").replaceChildren(
      ...Object.entries(names).map(([name, text]) =>
        make("li", {}, make("i", { style: `background: var(--${name})` }), text),
      ),
    );
  }

  // The query at a place of the canvas, if there is one.
  function queryAt(event) {
    const box = find("map").getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    for (let n = map.first; n < map.first + map.shown; n++) {
      const [left, top] = corner(n);
      const column = Math.floor((x - left) / map.scale);
      const row = Math.floor((y - top) / rowsHigh());
      if (column >= 0 && column < map.columns && row >= 0 && row < map.rows) {
        return [n, row, column].slice(3 - state.layout.length);
      }
    }
    return null;
  }

  function moveTo(query) {
    if (!query || by(query) === by(state.query)) return;
    state.query = query;
    drawMap(map.call);
    keep();
  }

  function onKey(event) {
    const rank = state.layout.length;
    const moves = {
      ArrowLeft: [rank - 1, -1],
      ArrowRight: [rank - 1, 1],
      ArrowUp: [rank - 2, -1],
      ArrowDown: [rank - 2, 1],
      PageUp: [rank - 3, -1],
      PageDown: [rank - 3, 1],
      Home: [rank - 1, -Infinity],
      End: [rank - 1, Infinity],
    };
    const [m, by] = moves[event.key] ?? [-1, 0];
    if (m < 0 || !map) return;
    event.preventDefault();
    const tiles = map.call.queryTile;
    const step = event.shiftKey && tiles.length === rank ? tiles[m] * state.dilation[m] : 1;
    const query = [...state.query];
    query[m] = Math.min(Math.max(query[m] + by * step, 0), state.layout[m] - 1);
    moveTo(query);
  }

  // ---- drawing: the strides ----

  let pareto = null;

  function searched(call) {
    // Of text, of tiles that start at the window, and of runs the search knows nothing.
    const settings =
      state.tiling === "single-dim" ? { ...state, queryTile: null, keyTile: null } : state;
    const tiles = settings.queryTile
      ? [[settings.queryTile, settings.keyTile]]
      : gpus[state.gpu].tiles[state.layout.length];
    const work = tiles.map(([query]) =>
      state.window
        .map((size, m) => size * Math.ceil(state.layout[m] / query[m]))
        .reduce((a, b) => a + b),
    );
    const choices =
      Math.max(...work) > MOST.strides ? null : simulator.search(settings, MOST.products);
    if (!choices) return { choices: null };
    const own =
      state.tiling === "permuted"
        ? [call.queryTile, call.keyTile]
        : [choices[0].queryTile, choices[0].keyTile];
    return { choices, now: simulator.choice(settings, ...own) };
  }

  const toldChoice = (choice) =>
    `Stride ${by(choice.stride, TIMES)}: ${times(choice.speedup)} of at most ` +
    `${times(choice.flopSpeedup)}, ${choice.blockSparse ? "no masks" : "some tiles masked"}, tiles ` +
    `${by(choice.queryTile, TIMES)} / ${by(choice.keyTile, TIMES)}.`;

  const take = (choice) => change({ stride: [...choice.stride] });

  function showPareto() {
    const { choices, now } = pareto;
    find("listed").hidden = !choices;
    find("point").hidden = !choices;
    if (!choices) {
      find("pareto").replaceChildren();
      say(
        "pareto-help",
        "these are too many strides to try here; `conceptax gna search` tries them.",
      );
      return;
    }
    const text = state.additional ? ", text apart" : "";
    const boxes = state.tiling === "permuted" ? "" : ", in boxes of the layout";
    find("pareto-help").textContent =
      "Further left, strides are finer and treat tokens more alike; " +
      `further up, attention is faster on tiles, masks counted in${text}${boxes}. Click a point to ` +
      "take its stride; with one in focus, arrows go on and Enter takes it.";
    drawPareto(choices, now);
    find("point").textContent = `Now: ${toldChoice(now)}`;
    find("listed").querySelector("summary").textContent = `As a list (${choices.length})`;
    const rows = choices.map((choice) => {
      const stride = by(choice.stride, TIMES);
      const chosen = by(choice.stride) === by(state.stride);
      return make(
        "tr",
        chosen ? { class: "chosen" } : {},
        make(
          "th",
          { scope: "row" },
          make("button", { type: "button", onclick: () => take(choice) }, stride),
        ),
        ...[
          times(choice.speedup),
          times(choice.tileSpeedup),
          times(choice.worstTileSpeedup),
          choice.blockSparse ? "none" : "some",
          percent(choice.sparsity, 2),
        ].map((cell) => make("td", {}, cell)),
      );
    });
    find("choices").replaceChildren(
      headed("stride", "speed-up", "mean tile", "worst tile", "masks", "sparsity"),
      make("tbody", {}, ...rows),
    );
  }

  function drawPareto(choices, now) {
    const holder = find("pareto");
    const width = holder.clientWidth;
    if (!width) return;
    const [left, right, top, bottom] = [44, 14, 12, 40];
    const height = Math.min(340, Math.max(220, width * 0.5));
    const all = [...choices, now];
    const coarse = Math.max(2, ...all.map((choice) => choice.coarseness));
    const fast =
      1.08 * Math.max(...all.map((choice) => Math.max(choice.speedup, choice.flopSpeedup)));
    const x = (value) => left + ((width - left - right) * Math.log(value)) / Math.log(coarse);
    const y = (value) => height - bottom - ((height - top - bottom) * value) / fast;
    const svg = make("svg", {
      viewBox: `0 0 ${width} ${height}`,
      height,
      role: "group",
      "aria-label": "Speed-up over the product of strides",
    });
    const line = (x1, y1, x2, y2, kind) => make("line", { x1, y1, x2, y2, class: kind });
    const label = (at, high, text, anchor) =>
      make("text", { x: at, y: high, "text-anchor": anchor }, text);
    const step = niceStep(fast / 5);
    for (let value = 0; value <= fast; value += step) {
      svg.append(
        line(left, y(value), width - right, y(value), "grid"),
        label(left - 6, y(value) + 4, `${number(Number(value.toPrecision(3)))}${TIMES}`, "end"),
      );
    }
    const every = Math.max(1, Math.ceil(Math.log2(coarse) / Math.max(3, width / 70)));
    for (let power = 0; 2 ** power <= coarse; power += every) {
      svg.append(label(x(2 ** power), height - bottom + 18, number(2 ** power), "middle"));
    }
    svg.append(label((left + width - right) / 2, height - 4, "product of the strides", "middle"));
    const bound = now.flopSpeedup;
    // Of causal windows each stride has its own.
    if (choices.every((choice) => choice.flopSpeedup === bound)) {
      svg.append(
        line(left, y(bound), width - right, y(bound), "bound"),
        label(left + 6, y(bound) + 14, `bound ${times(bound)}`, "start"),
      );
    }
    const ordered = [...choices].sort(
      (a, b) => a.coarseness - b.coarseness || a.speedup - b.speedup,
    );
    const points = ordered.map((choice, n) => {
      const at = { cx: x(choice.coarseness), cy: y(choice.speedup) };
      const same = by(choice.stride) === by(state.stride);
      const tell = () => {
        find("point").textContent = toldChoice(choice);
      };
      const point = make(
        "g",
        {
          class: `point ${choice.blockSparse ? "free" : "masked"}`,
          role: "button",
          tabindex: n === 0 ? 0 : -1,
          "aria-label": toldChoice(choice),
          onclick: () => take(choice),
          onfocus: tell,
          onpointerenter: tell,
          onpointerleave: () => {
            find("point").textContent = `Now: ${toldChoice(now)}`;
          },
          onkeydown: (event) => {
            const to = {
              ArrowRight: n + 1,
              ArrowUp: n + 1,
              ArrowLeft: n - 1,
              ArrowDown: n - 1,
              Home: 0,
              End: points.length - 1,
            }[event.key];
            if (event.key === "Enter" || event.key === " ") take(choice);
            else if (to === undefined) return;
            event.preventDefault();
            points[to]?.focus();
          },
        },
        make("circle", { ...at, r: 13, class: "target" }),
        make("circle", { ...at, r: 6, class: "dot" }),
      );
      if (same) point.setAttribute("aria-current", "true");
      return point;
    });
    svg.append(
      ...points,
      make(
        "circle",
        {
          cx: x(now.coarseness),
          cy: y(now.speedup),
          r: 10,
          class: "now",
        },
        make("title", {}, "the stride that is set"),
      ),
    );
    holder.replaceChildren(svg);
  }

  function niceStep(least) {
    const power = 10 ** Math.floor(Math.log10(least));
    return power * [1, 2, 5, 10].find((each) => each * power >= least);
  }

  // ---- what to copy ----

  const tuple = (values) => `(${values.join(", ")}${values.length === 1 ? "," : ""})`;
  const bool = (value) => (value ? "True" : "False");
  const plainWindows = () => state.dilation.every((d) => d === 1) && !state.causal.includes(true);

  // Arguments of Python that are not their defaults.
  function windowArguments(name = "kernel_size") {
    const given = [`${name}=${tuple(state.window)}`];
    if (state.stride.some((s) => s > 1)) given.push(`stride=${tuple(state.stride)}`);
    if (state.dilation.some((d) => d > 1)) given.push(`dilation=${tuple(state.dilation)}`);
    if (state.causal.includes(true)) given.push(`is_causal=${tuple(state.causal.map(bool))}`);
    return given;
  }

  const callText = (name, given) => `${name}(\n${given.map((one) => `    ${one},\n`).join("")})`;

  function attendText() {
    const layout = state.layout.join(", ");
    const shape = (heads) => `[${state.batch}, ${layout}, ${heads}, ${state.headDim}]`;
    const causal = state.causal.includes(true);
    if (state.additional && state.additionalQueries && !causal) {
      const text = `[${state.batch}, ${state.additional}, ${state.heads}, ${state.headDim}]`;
      return (
        "from conceptax.kernels.gna import joint_neighborhood_attention\n\n" +
        `# image: query, key and value [${state.batch}, ${product(state.layout)}, ${state.heads}, ` +
        `${state.headDim}]; text: the same of ${text}\n` +
        `image, text = ${callText("joint_neighborhood_attention", [
          "image",
          "text",
          `token_layout=${tuple(state.layout)}`,
          ...windowArguments(),
        ])}`
      );
    }
    const text = state.additional
      ? ["additional_keys=text_keys", "additional_values=text_values"]
      : [];
    const note = state.additional
      ? `# text_keys, text_values: [${state.batch}, ${state.additional}, ` +
        `${state.kvHeads}, ${state.headDim}]\n`
      : "";
    return (
      "from conceptax.kernels.gna import neighborhood_attention\n\n" +
      `# query: ${shape(state.heads)}; key, value: ${shape(state.kvHeads)}\n${note}` +
      `output = ${callText("neighborhood_attention", [
        "query",
        "key",
        "value",
        ...windowArguments(),
        ...text,
      ])}`
    );
  }

  // Whether `simulate_model` has arguments for all that is set.
  const asModel = () => state.preset && plainWindows() && state.tiling === "permuted";

  function tilesGiven(flag) {
    const [q, k] = asModel() || state.queryTile ? [state.queryTile, state.keyTile] : drawnTiles();
    return q ? [flag("query_tile", q), flag("key_tile", k)] : [];
  }

  // One call of a model takes the tiles that the model was simulated in.
  const drawnTiles = () => (state.preset ? [map.call.queryTile, map.call.keyTile] : [null, null]);

  function simulateText() {
    const flag = (name, value) => `${name}=${tuple(value)}`;
    if (asModel()) {
      const preset = presets[state.preset];
      const same = unchanged("window") && unchanged("stride");
      const given = [`"${state.preset}"`];
      if (!same) given.push(`attention=Preset(${tuple(state.window)}, ${tuple(state.stride)})`);
      if (!unchanged("layout")) given.push(`layout=${tuple(state.layout)}`);
      if (state.steps !== preset.steps) given.push(`steps=${state.steps}`);
      given.push(`dense_steps=${state.denseSteps}`, ...tilesGiven(flag));
      if (state.maskEveryTile) given.push("mask_every_tile=True");
      given.push(`gpu="${state.gpu}"`);
      return (
        `${same ? "" : "from conceptax.kernels.gna.presets import Preset\n"}` +
        "from conceptax.kernels.gna.simulator import simulate_model\n\n" +
        `result = ${callText("simulate_model", given)}\n` +
        "result.kernel_speedup, result.end_to_end(result.kernel_speedup)\n" +
        "result.sample_seconds(result.preset.dense_steps)"
      );
    }
    const given = [tuple(state.layout), ...windowArguments(), ...tilesGiven(flag)];
    if (state.tiling !== "permuted") given.push(`tiling="${state.tiling}"`);
    const numbers = {
      batch: ["batch", 1],
      heads: ["heads", 1],
      kvHeads: ["kv_heads", state.heads],
      headDim: ["head_dim", 128],
      additional: ["additional", 0],
    };
    for (const [name, [argument, usual]] of Object.entries(numbers)) {
      if (state[name] !== usual) given.push(`${argument}=${state[name]}`);
    }
    if (state.additional && state.additionalQueries) given.push("additional_queries=True");
    if (state.maskEveryTile) given.push("mask_every_tile=True");
    given.push(`gpu="${state.gpu}"`);
    return (
      "from conceptax.kernels.gna.simulator import simulate\n\n" +
      `result = ${callText("simulate", given)}\n` +
      "result.flop_speedup, result.tile_speedup, result.seconds, result.dense_seconds"
    );
  }

  function commandText() {
    const list = (flag, values) => `--${flag.replaceAll("_", "-")} ${values.join(" ")}`;
    const words = ["conceptax gna simulate"];
    const model = asModel();
    if (model) words.push(`--model ${state.preset}`);
    if (!model || !unchanged("layout")) words.push(list("layout", state.layout));
    if (!model || !unchanged("window") || !unchanged("stride")) {
      words.push(list("window", state.window), list("stride", state.stride));
    }
    if (state.dilation.some((d) => d > 1)) words.push(list("dilation", state.dilation));
    if (state.causal.includes(true)) words.push(list("causal", state.causal.map(bool)));
    words.push(...tilesGiven(list));
    if (state.maskEveryTile) words.push("--mask-every-tile");
    if (model) words.push(`--steps ${state.steps}`, `--dense-steps ${state.denseSteps}`);
    else {
      if (state.tiling !== "permuted") words.push(`--tiling ${state.tiling}`);
      words.push(
        `--batch ${state.batch}`,
        `--heads ${state.heads}`,
        `--kv-heads ${state.kvHeads}`,
        `--head-dim ${state.headDim}`,
      );
      if (state.additional) words.push(`--additional ${state.additional}`);
      if (state.additional && state.additionalQueries) words.push("--additional-queries");
    }
    return [...words, `--gpu ${state.gpu}`].join(" \\\n    ");
  }

  function showCode() {
    const texts = {
      "Attend, in Python": attendText(),
      "Simulate, in Python": simulateText(),
      "Simulate, in a shell": commandText(),
    };
    find("code").replaceChildren(
      ...Object.entries(texts).map(([title, text]) =>
        make(
          "div",
          { class: "snippet" },
          make("h3", {}, title),
          make("pre", { tabindex: 0, "aria-label": title }, text),
          make(
            "button",
            {
              type: "button",
              "aria-label": `Copy: ${title}`,
              onclick: (event) => copy(text, event.target),
            },
            "Copy",
          ),
        ),
      ),
    );
  }

  async function copy(text, button) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Without permission, as an older page would.
      const area = make("textarea", { readonly: true, class: "hidden" });
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
      button.focus();
    }
    const said = button.textContent;
    button.textContent = "Copied";
    setTimeout(() => {
      button.textContent = said;
    }, 1500);
  }

  // ---- the form ----

  const inputs = {}; // by the setting's name, or name and dimension

  function field(name, m = null) {
    const key = m === null ? name : `${name}-${m}`;
    const label = m === null ? undefined : `${LABELS[name] ?? name}, dimension ${m}`;
    const least = ["additional", "denseSteps", "share"].includes(name) ? 0 : 1;
    const made = make("input", {
      type: "number",
      id: key,
      min: least,
      step: name === "share" ? "any" : 1,
      inputmode: name === "share" ? "decimal" : "numeric",
      "aria-label": label,
      oninput: () => {
        const value = made.value === "" ? NaN : Number(made.value);
        if (m === null) change({ [name]: value });
        else change({ [name]: state[name].map((old, n) => (n === m ? value : old)) });
      },
    });
    inputs[key] = made;
    return made;
  }

  function buildForm() {
    const option = (value, text) => make("option", { value }, text);
    const told = (name) => `${presets[name].model}, ${by(presets[name].layout, TIMES)} (${name})`;
    find("preset").append(
      ...Object.keys(presets).map((name) => option(name, told(name))),
      option("", "your own"),
    );
    find("gpu").append(...OPTIONS.gpu.map((name) => option(name, name.toUpperCase())));
    find("call").append(
      ...Object.entries(CALL).map(([name, text]) => make("label", {}, text, field(name))),
    );
    find("model").append(
      ...Object.entries(MODEL).map(([name, text]) =>
        make("label", { id: `${name}-label` }, text, field(name)),
      ),
    );
    find("preset").addEventListener("change", (event) => {
      if (event.target.value) restart(settingsOf(event.target.value, state.gpu));
      else change({ preset: "" });
    });
    find("rank").addEventListener("change", (event) => changeRank(Number(event.target.value)));
    find("tiles").addEventListener("change", (event) => {
      const own = event.target.value === "own";
      const [queryTile, keyTile] = !own
        ? [null, null]
        : map
          ? [map.call.queryTile, map.call.keyTile]
          : tileShapes()[0];
      change({ queryTile: queryTile && [...queryTile], keyTile: keyTile && [...keyTile] });
    });
    find("tiling").addEventListener("change", (event) => {
      // Tiles of your own would have another number of dimensions.
      const flat = (value) => value === "single-dim";
      const other = flat(event.target.value) !== flat(state.tiling);
      change({ tiling: event.target.value, ...(other ? { queryTile: null, keyTile: null } : {}) });
    });
    find("gpu").addEventListener("change", (event) => change({ gpu: event.target.value }));
    for (const name of ["maskEveryTile", "additionalQueries"]) {
      find(name).addEventListener("change", (event) => change({ [name]: event.target.checked }));
    }
    find("settings").addEventListener("submit", (event) => event.preventDefault());
  }

  let built = ""; // what the rows of sizes were built for

  function buildSizes() {
    const names = [...PER_DIMENSION, ...(state.queryTile ? ["queryTile", "keyTile"] : [])];
    const key = [state.layout.length, names.length, state.tiling].join();
    if (key === built) return;
    built = key;
    const rank = state.layout.length;
    find("dimensions").replaceChildren(
      make(
        "tr",
        {},
        make("th", {}, make("span", { class: "hidden" }, "setting")),
        ...state.layout.map((_, m) => make("th", { scope: "col" }, `dim ${m}`)),
      ),
    );
    const row = (name, cells) =>
      make(
        "tr",
        {},
        make("th", { scope: "row" }, LABELS[name] ?? name),
        ...cells.map((cell) => make("td", {}, cell)),
      );
    const rows = names.map((name) =>
      row(
        name,
        state[name].map((_, m) => field(name, m)),
      ),
    );
    const causal = state.causal.map((_, m) => {
      const made = make("input", {
        type: "checkbox",
        id: `causal-${m}`,
        "aria-label": `causal, dimension ${m}`,
        onchange: () =>
          change({
            causal: state.causal.map((old, n) => (n === m ? made.checked : old)),
          }),
      });
      return made;
    });
    rows.splice(PER_DIMENSION.length, 0, row("causal", causal));
    find("sizes").replaceChildren(...rows);
    find("sizes").style.setProperty("--rank", rank);
  }

  function fillForm() {
    buildSizes();
    find("preset").value = state.preset;
    find("source").textContent = state.preset ? `Source: ${presets[state.preset].source}.` : "";
    find("rank").value = state.layout.length;
    find("tiles").value = state.queryTile ? "own" : "auto";
    for (const name of ["tiling", "gpu"]) find(name).value = state[name];
    for (const name of ["maskEveryTile", "additionalQueries"]) find(name).checked = state[name];
    state.causal.forEach((on, m) => {
      find(`causal-${m}`).checked = on;
    });
    const wrong = wrongNumber();
    const mark = (key, value, bad) => {
      const input = inputs[key];
      // What is being typed stays.
      if (document.activeElement !== input && !Number.isNaN(value)) input.value = value;
      input.setAttribute("aria-invalid", String(bad));
    };
    for (const name of [...PER_DIMENSION, "queryTile", "keyTile"].filter((one) => state[one])) {
      state[name].forEach((value, m) =>
        mark(`${name}-${m}`, value, Boolean(wrong) && wrong[0] === name && wrong[1] === m),
      );
    }
    for (const name of [...Object.keys(CALL), ...Object.keys(MODEL)]) {
      mark(name, state[name], Boolean(wrong) && wrong[0] === name);
    }
    // A model's call is as the model has it.
    for (const name of Object.keys(CALL)) inputs[name].disabled = Boolean(state.preset);
    find("additionalQueries").disabled = Boolean(state.preset) || !state.additional;
    find("share-label").hidden = Boolean(state.preset);
    find("slices-help").hidden = state.layout.length < 3;
  }

  function changeRank(rank) {
    const layout = fitted("layout", state.layout, rank);
    const next = { preset: "", layout, queryTile: null, keyTile: null };
    for (const name of [...PER_DIMENSION.slice(1), "causal", "query"]) {
      next[name] = fitted(name, state[name], rank, layout);
    }
    change(next);
  }

  // ---- all together ----

  let waiting = 0;
  let keeping = 0;

  // The address holds all settings, so that it can be passed on.
  function keep() {
    clearTimeout(keeping);
    keeping = setTimeout(() => history.replaceState(null, "", written()), 150);
  }

  function change(some) {
    Object.assign(state, some);
    state.query = state.query.map((x, m) => Math.min(x, Math.max((state.layout[m] || 1) - 1, 0)));
    fillForm();
    clearTimeout(waiting);
    waiting = setTimeout(show, 60);
  }

  function restart(next) {
    state = next;
    fillForm();
    show();
  }

  function show() {
    const refused = refusal();
    say("refused", refused);
    find("results").classList.toggle("stale", Boolean(refused));
    find("results").inert = Boolean(refused);
    say("advice", "");
    if (refused) return;
    const answers = Object.fromEntries(OPTIONS.gpu.map((gpu) => [gpu, simulated(gpu)]));
    const { call } = answers[state.gpu];
    say("advice", adviceOf(call));
    showFigures(call);
    drawMap(call);
    keepingFocus("times", () => showTimes(answers));
    pareto = searched(call);
    keepingFocus("pareto", () => keepingFocus("choices", showPareto));
    showModel(answers[state.gpu]);
    showCode();
    keep();
  }

  function open() {
    const { next, unread } = read(location.hash);
    restart(next);
    if (unread.length) {
      const [stays, it] = unread.length > 1 ? ["stay", "them"] : ["stays", "it"];
      say(
        "advice",
        `the link's ${unread.join(", ")} could not be read and ${stays} as the preset has ` +
          `${it}.`,
      );
    }
  }

  function redraw() {
    if (find("results").inert) return;
    if (map) drawMap(map.call);
    if (pareto?.choices) drawPareto(pareto.choices, pareto.now);
  }

  buildForm();
  showLegend();
  find("more").open = matchMedia("(min-width: 62rem)").matches;
  find("link").addEventListener("click", (event) => {
    history.replaceState(null, "", written());
    copy(location.href, event.target);
  });
  const canvas = find("map");
  canvas.addEventListener("pointermove", (event) => moveTo(queryAt(event)));
  canvas.addEventListener("pointerdown", (event) => moveTo(queryAt(event)));
  canvas.addEventListener("keydown", onKey);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // a phone's bars change the height alone
    width = innerWidth;
    if (matchMedia("(min-width: 62rem)").matches) find("more").open = true;
    redraw();
  });
  addEventListener("hashchange", open);
  open();
})();
