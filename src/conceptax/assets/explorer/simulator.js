// The neighborhood attention simulator in the browser: `conceptax.kernels.gna`, number for number.
//
// A port of tiles.py, simulator/{simulate,schedule,whole_model,search}.py and what presets.py and
// problem.py say of a window that does not fit. tests/reporting/test_gna_explorer.py compares all of
// it with Python, which also gives every constant. Integers stay below 2^53, or are BigInts; sums of
// floats run in Python's order.
"use strict";

const createSimulator = (constants) => {
  const product = (numbers) => numbers.reduce((a, b) => a * b, 1);
  const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
  const ceilDiv = (a, b) => Math.ceil(a / b);
  const floorDiv = (a, b) => Math.floor(a / b);
  const by = (sizes, sign = "x") => sizes.join(sign);

  // ---- windows and tiles ----

  // One object {length, size, stride, dilation, causal} for each dimension of `settings`.
  const windowsOf = ({ layout, window, stride, dilation, causal }) =>
    layout.map((length, m) => ({
      length,
      size: window[m],
      stride: stride[m],
      dilation: dilation[m],
      causal: causal[m],
    }));

  const groupLength = (window, group) => ceilDiv(window.length - group, window.dilation);

  // First key and one past the last key of query `i` in a group of `length` tokens.
  function bounds(i, length, { size, stride, causal }) {
    i = Math.min(i, length - 1);
    const first = floorDiv(i, stride) * stride;
    if (causal) {
      const leader = Math.min(first + stride - 1, length - 1);
      return [Math.max(leader - size + 1, 0), i + 1];
    }
    const leader = Math.min(first + floorDiv(stride, 2), length - 1);
    const start = Math.min(Math.max(leader - floorDiv(size, 2), 0), length - size);
    return [start, start + size];
  }

  // Key tiles that query tile `tile` of a group visits, first <= tile < last, counted from the token
  // `origin`; those from freeFirst to freeLast need no mask. `dynamic` ones start at the window.
  function visitsOf(window, length, tile, queryTile, keyTile, dynamic = false) {
    const [firstStart, firstEnd] = bounds(tile * queryTile, length, window);
    const [lastStart, lastEnd] = bounds((tile + 1) * queryTile - 1, length, window);
    const origin = dynamic ? firstStart : 0;
    const freeFirst = ceilDiv(lastStart - origin, keyTile);
    const end = firstEnd - origin;
    // Past the group's end there is nothing to mask but padding.
    const freeLast = firstEnd === length ? ceilDiv(end, keyTile) : floorDiv(end, keyTile);
    return {
      origin,
      first: floorDiv(firstStart - origin, keyTile),
      last: ceilDiv(lastEnd - origin, keyTile),
      freeFirst,
      freeLast: Math.max(freeLast, freeFirst),
    };
  }

  // One dimension's visited and mask-free key tiles [groups, tiles]; none for nothing but padding.
  function tilesAlong(window, queryTile, keyTile, dynamic) {
    const groups = window.dilation;
    const tiles = ceilDiv(groupLength(window, 0), queryTile);
    const visited = new Float64Array(groups * tiles);
    const free = new Float64Array(groups * tiles);
    for (let group = 0; group < groups; group++) {
      const length = groupLength(window, group);
      for (let tile = 0; tile < ceilDiv(length, queryTile); tile++) {
        const found = visitsOf(window, length, tile, queryTile, keyTile, dynamic);
        visited[group * tiles + tile] = found.last - found.first;
        free[group * tiles + tile] = found.freeLast - found.freeFirst;
      }
    }
    return { groups, tiles, visited, free };
  }

  // [G, T] and [H, U] to [G H, T U].
  function outer(left, right) {
    const groups = left.groups * right.groups;
    const tiles = left.tiles * right.tiles;
    const visited = new Float64Array(groups * tiles);
    const free = new Float64Array(groups * tiles);
    let n = 0;
    for (let g = 0; g < left.groups; g++) {
      for (let h = 0; h < right.groups; h++) {
        for (let t = 0; t < left.tiles; t++) {
          for (let u = 0; u < right.tiles; u++, n++) {
            const [a, b] = [g * left.tiles + t, h * right.tiles + u];
            visited[n] = left.visited[a] * right.visited[b];
            free[n] = left.free[a] * right.free[b];
          }
        }
      }
    }
    return { groups, tiles, visited, free };
  }

  function unravel(flat, layout) {
    const found = new Array(layout.length);
    for (let m = layout.length - 1; m >= 0; m--) {
      found[m] = flat % layout[m];
      flat = floorDiv(flat, layout[m]);
    }
    return found;
  }

  // How many of some queries see each key along a dimension.
  function tally(window, queries) {
    const { length, dilation } = window;
    const counts = new Uint32Array(length);
    for (const x of queries) {
      const group = x % dilation;
      const [start, end] = bounds(floorDiv(x, dilation), groupLength(window, group), window);
      for (let j = start; j < end; j++) counts[j * dilation + group]++;
    }
    return counts;
  }

  // Calls `visit(first, end)` for each run of flattened tokens that all dimensions' masks hold.
  function eachRun(masks, visit) {
    let outside = [1];
    for (const mask of masks.slice(0, -1)) {
      const wider = new Uint8Array(outside.length * mask.length);
      outside.forEach((a, n) => a && wider.set(mask, n * mask.length));
      outside = wider;
    }
    const last = masks[masks.length - 1];
    const runs = [];
    last.forEach((inside, x) => {
      if (inside && x && last[x - 1]) runs[runs.length - 1][1]++;
      else if (inside) runs.push([x, x + 1]);
    });
    outside.forEach((row, n) => {
      const base = n * last.length;
      if (row) runs.forEach(([first, end]) => visit(base + first, base + end));
    });
  }

  // The same for each token.
  const eachToken = (masks, visit) =>
    eachRun(masks, (first, end) => {
      for (let flat = first; flat < end; flat++) visit(flat);
    });

  // Of one query tile, a run of flattened tokens: which key tiles it visits, and which need no mask.
  function flatTile(windows, tile, queryTile, keyTile) {
    const layout = windows.map((window) => window.length);
    const tokens = product(layout);
    const last = layout.length - 1;
    const visited = new Uint8Array(ceilDiv(tokens, keyTile));
    const seen = new Float64Array(visited.length); // by every query
    const rows = new Map();
    const places = layout.map(() => new Set());
    const past = Math.min((tile + 1) * queryTile, tokens);
    for (let flat = tile * queryTile; flat < past; flat++) {
      const query = unravel(flat, layout);
      const row = query.slice(0, -1).join();
      if (!rows.has(row)) rows.set(row, []);
      rows.get(row).push(query);
      query.forEach((x, m) => places[m].add(x));
    }
    // Queries of one row of the last dimension see a box of keys together.
    for (const row of rows.values()) {
      const masks = windows.map((window, m) =>
        tally(window, m < last ? [row[0][m]] : row.map((query) => query[m])),
      );
      eachRun(masks, (first, end) => {
        for (let key = floorDiv(first, keyTile); key * keyTile < end; key++) visited[key] = 1;
      });
    }
    // Keys that every query sees are one box; those past the end need no mask.
    const every = windows.map((window, m) =>
      tally(window, places[m]).map((count) => Number(count === places[m].size)),
    );
    eachRun(every, (first, end) => {
      for (let key = floorDiv(first, keyTile); key * keyTile < end; key++) {
        seen[key] += Math.min(end, (key + 1) * keyTile) - Math.max(first, key * keyTile);
      }
    });
    const size = (key) => Math.min((key + 1) * keyTile, tokens) - key * keyTile;
    return { visited, free: visited.map((_, key) => Number(seen[key] === size(key))) };
  }

  const counted = new Map(); // GPUs share tiles, and a model's two calls do

  // Key tiles that each query tile visits, and those without a mask.
  function countTiles(...asked) {
    const key = JSON.stringify(asked);
    if (!counted.has(key)) {
      if (counted.size > 16) counted.clear();
      counted.set(key, countTilesAnew(...asked));
    }
    return counted.get(key);
  }

  function countTilesAnew(windows, queryTile, keyTile, tiling) {
    if (tiling !== "single-dim") {
      return windows
        .map((window, m) => tilesAlong(window, queryTile[m], keyTile[m], tiling === "fused"))
        .reduce(outer);
    }
    const tiles = ceilDiv(product(windows.map((window) => window.length)), queryTile[0]);
    const visited = new Float64Array(tiles);
    const free = new Float64Array(tiles);
    for (let tile = 0; tile < tiles; tile++) {
      const found = flatTile(windows, tile, queryTile[0], keyTile[0]);
      visited[tile] = sum(found.visited);
      free[tile] = sum(found.free);
    }
    return { groups: 1, tiles, visited, free };
  }

  // Pairs of query and key along a dimension.
  function pairsOf(window) {
    if (!window.causal) return window.length * window.size;
    let pairs = 0;
    for (let group = 0; group < window.dilation; group++) {
      const length = groupLength(window, group);
      for (let first = 0; first < length; first += window.stride) {
        // A stride group shares its first key, and a query is its own last one.
        const queries = Math.min(window.stride, length - first);
        const [start] = bounds(first, length, window);
        pairs += queries * (first - start) + (queries * (queries + 1)) / 2;
      }
    }
    return pairs;
  }

  // ---- time ----

  const work = (gpu, [blocks, steps, masked]) =>
    blocks * gpu.launch + steps * gpu.step + masked * (gpu.step * gpu.mask);

  // Blocks, steps and masked steps of the slot that finishes last, where blocks start in order, each
  // on the first free slot.
  function criticalWork({ steps, masked, repeats }, gpu) {
    const slots = gpu.processors * gpu.slots;
    const count = steps.length;
    if (steps.every((x) => x === steps[0]) && masked.every((x) => x === masked[0])) {
      const waves = ceilDiv(count * repeats, slots);
      return [waves, waves * steps[0], waves * masked[0]];
    }
    const costs = steps.map((_, n) => work(gpu, [1, steps[n], masked[n]]));
    // A heap of the slots by the time at which they are free, then by number.
    const time = new Float64Array(slots);
    const slot = Int32Array.from(time, (_, n) => n);
    const loads = [0, 1, 2].map(() => new Float64Array(slots));
    const before = (a, b) => time[a] < time[b] || (time[a] === time[b] && slot[a] < slot[b]);
    for (let repeat = 0; repeat < repeats; repeat++) {
      for (let n = 0; n < count; n++) {
        loads[0][slot[0]]++;
        loads[1][slot[0]] += steps[n];
        loads[2][slot[0]] += masked[n];
        time[0] += costs[n];
        for (let at = 0, next = 1; next < slots; next = 2 * at + 1) {
          if (next + 1 < slots && before(next + 1, next)) next++;
          if (!before(next, at)) break;
          [time[at], time[next]] = [time[next], time[at]];
          [slot[at], slot[next]] = [slot[next], slot[at]];
          at = next;
        }
      }
    }
    let best = 0;
    const load = (n) => loads.map((column) => column[n]);
    for (let n = 1; n < slots; n++) if (work(gpu, load(n)) > work(gpu, load(best))) best = n;
    return load(best);
  }

  const secondsOf = (blocks, gpu) => work(gpu, criticalWork(blocks, gpu));

  // ---- one attention ----

  const tileOptions = (settings, gpu) => {
    if (settings.queryTile) return [[settings.queryTile, settings.keyTile]];
    return gpu.tiles[settings.tiling === "single-dim" ? 1 : settings.layout.length];
  };

  // Counts of one head and times of the whole call.
  //
  // settings: layout, window, stride, dilation, causal (a list each); queryTile and keyTile (lists,
  // or null for those of the GPU's that visit fewest pairs); tiling; batch, heads, kvHeads, headDim;
  // additional, additionalQueries; maskEveryTile; gpu, a name.
  function simulate(settings) {
    const { tiling, batch, heads, kvHeads, headDim, additional } = settings;
    const gpu = constants.gpus[settings.gpu];
    const windows = windowsOf(settings);
    let best = null;
    for (const [queryTile, keyTile] of tileOptions(settings, gpu)) {
      const counts = countTiles(windows, queryTile, keyTile, tiling);
      const area = product(queryTile) * product(keyTile);
      const met = sum(counts.visited) * area;
      if (best === null || met < best.met) best = { queryTile, keyTile, met, ...counts };
    }
    const { queryTile, keyTile, visited, free } = best;
    const tokens = product(settings.layout);
    const [querySize, keySize] = [product(queryTile), product(keyTile)];
    const everything = tokens + additional;
    const queries = settings.additionalQueries ? everything : tokens;
    const denseRow = ceilDiv(everything, keySize);
    const extra = ceilDiv(additional, keySize);
    const extraMasked = Number(additional % keySize > 0);
    const textTiles = settings.additionalQueries ? ceilDiv(additional, querySize) : 0;
    // Of each block: key tiles visited, and those among them without a mask.
    const seen = new Float64Array(visited.length + textTiles).fill(denseRow);
    const unmasked = Float64Array.from(seen);
    visited.forEach((count, n) => {
      seen[n] = count > 0 ? count + extra : 0;
      unmasked[n] = count > 0 ? free[n] + extra - extraMasked : 0;
    });
    const blockSparse = visited.every((count, n) => count === free[n]);
    const all = settings.maskEveryTile && !blockSparse;
    const unit = (querySize * keySize * headDim) / 128 ** 3;
    const blocks = {
      steps: seen.map((count) => unit * count),
      masked: seen.map((count, n) => unit * (all ? count : count - unmasked[n])),
      repeats: batch * heads,
    };
    const denseCount = ceilDiv(queries, querySize);
    const dense = new Float64Array(denseCount).fill(unit * denseRow);
    const denseBlocks = {
      steps: dense,
      masked: new Float64Array(denseCount),
      repeats: batch * heads,
    };

    const extraPairs = additional * (tokens + (settings.additionalQueries ? everything : 0));
    const pairs = product(windows.map(pairsOf)) + extraPairs;
    const densePairs = queries * everything;
    // By one token of queries and outputs, or of keys and values.
    const moved = 2 * headDim * constants.bytes * batch;
    const permuted = tiling === "permuted" && (windows.length > 1 || windows[0].dilation > 1);
    const held = visited.filter((count) => count > 0);
    const visitedTiles = sum(seen);
    const freeTiles = sum(unmasked);
    const denseTiles = denseCount * denseRow;
    const worst = visited.reduce((a, b) => Math.max(a, b)) + extra;
    const memoryFloor = (moved * (queries * heads + everything * kvHeads)) / gpu.bandwidth;
    const permutation = permuted ? (2 * moved * tokens * (heads + kvHeads)) / gpu.bandwidth : 0;
    const seconds = Math.max(secondsOf(blocks, gpu), memoryFloor);
    const denseSeconds = Math.max(secondsOf(denseBlocks, gpu), memoryFloor);
    const flopSpeedup = densePairs / pairs;
    const tileSpeedup = denseTiles / visitedTiles;
    return {
      queryTile,
      keyTile,
      pairs,
      densePairs,
      queryTiles: seen.length,
      denseTiles,
      visitedTiles,
      freeTiles,
      blockSparse,
      memoryFloor,
      permutation,
      seconds,
      denseSeconds,
      flopSpeedup,
      tileSpeedup,
      sparsity: 1 - pairs / densePairs,
      meanVisits: sum(held) / held.length + extra,
      worstVisits: worst,
      allVisits: denseRow,
      worstTileSpeedup: denseRow / worst,
      boundShare: tileSpeedup / flopSpeedup,
      freeShare: freeTiles / visitedTiles,
      waves: ceilDiv(seen.length * batch * heads, gpu.processors * gpu.slots),
      waveSpeedup: denseSeconds / seconds,
      speedup: denseSeconds / (seconds + permutation),
    };
  }

  // ---- a whole model ----

  // Amdahl's law; see `end_to_end_speedup`.
  const amdahl = (share, relative, replaced = 1, permutation = 0) =>
    1 / (1 - share + share * (1 - replaced + replaced * relative + permutation));

  // Of a model that spends a share of its time in dense attention like this.
  const endToEnd = (simulation, share, replaced) =>
    amdahl(
      share,
      simulation.seconds / simulation.denseSeconds,
      replaced,
      (replaced * simulation.permutation) / simulation.denseSeconds,
    );

  // Floating-point operations of a transformer's forward pass, which may exceed 2^53.
  function operations(model, tokens) {
    const [layers, width, text, own] = [
      model.layers,
      model.heads * model.headDim,
      model.text,
      tokens,
    ].map(BigInt);
    const read = model.joint ? own + text : own;
    const linear = 2n * (BigInt(model.weights) * own + BigInt(model.textWeights) * text);
    const cross = model.joint ? 0n : 4n * width * own * text;
    const each = { linear, attention: 4n * width * read ** 2n, cross };
    return Object.fromEntries(
      Object.entries(each).map(([name, value]) => [name, Number(layers * value)]),
    );
  }

  const speedups = (simulation) => ({
    pairs: simulation.flopSpeedup,
    "worst query tile": simulation.worstTileSpeedup,
    "mean query tile": simulation.tileSpeedup,
    kernel: Math.min(simulation.flopSpeedup, simulation.waveSpeedup),
    "kernel and permutation": Math.min(simulation.flopSpeedup, simulation.speedup),
  });

  // Python's `round`, for a share of the steps.
  function round(value) {
    const down = Math.floor(value);
    const rest = value - down;
    return rest > 0.5 || (rest === 0.5 && down % 2) ? down + 1 : down;
  }

  const denseStepsOf = (preset, steps) => round((steps * preset.denseSteps) / preset.steps);

  // As `simulate`, of a preset's model: the call's sizes are the model's. Tiles, where none are
  // given, are the preset's as long as the layout is.
  function simulateModel(name, settings, steps, denseSteps) {
    const preset = constants.presets[name];
    const model = constants.models[preset.model];
    const gpu = constants.gpus[settings.gpu];
    const own = by(settings.layout) === by(preset.layout);
    const given = settings.queryTile || settings.tiling === "single-dim";
    const tiles = own && !given ? preset.tiles[gpu.tileClass] : null;
    const call = {
      ...settings,
      ...(tiles ? { queryTile: tiles[0], keyTile: tiles[1] } : {}),
      batch: 1,
      heads: model.heads,
      kvHeads: model.heads,
      headDim: model.headDim,
      additional: 0,
      additionalQueries: false,
    };
    const imageAlone = simulate(call);
    const withText = model.joint
      ? simulate({ ...call, additional: model.text, additionalQueries: true })
      : imageAlone;
    const counted = operations(model, product(settings.layout));
    const { linear, attention } = constants.rates[settings.gpu];
    const forward = (speedup) =>
      counted.linear / linear.flops +
      (counted.cross + counted.attention / speedup) / attention.flops;
    const replaced = 1 - denseSteps / steps;
    const kernel = speedups(withText).kernel;
    const sample = (dense) =>
      model.forwards * (dense * forward(1) + (steps - dense) * forward(kernel));
    const shares = { rates: 1 - forward(Infinity) / forward(1) };
    if (own && preset.attentionShare !== null) shares.published = preset.attentionShare;
    const rows = [];
    for (const [tokens, simulation] of Object.entries({ imageAlone, withText })) {
      for (const [what, speedup] of Object.entries(speedups(simulation))) {
        const ends = Object.entries(shares).map(([known, share]) => [
          known,
          {
            allSteps: amdahl(share, 1 / speedup),
            afterDenseSteps: amdahl(share, 1 / speedup, replaced),
          },
        ]);
        rows.push({ tokens, counted: what, speedup, endToEnd: Object.fromEntries(ends) });
      }
    }
    return {
      preset,
      model,
      operations: counted,
      imageAlone,
      withText,
      shares,
      rows,
      forward: { dense: forward(1), sparse: forward(kernel) },
      sample: { dense: sample(steps), afterDenseSteps: sample(denseSteps), allSteps: sample(0) },
    };
  }

  // ---- the strides that nothing beats ----

  // Counts along one dimension for all strides of a window.
  function tabulate(window, queryTile, keyTile, thin) {
    const every = window.size <= constants.allRows && !thin;
    const step = every ? 1 : queryTile;
    const strides = every ? [] : [1];
    for (let stride = step; stride <= window.size; stride += step) {
      if (stride > 1 || every) strides.push(stride);
    }
    return strides.map((stride) => {
      const row = { stride, pairs: 0, visited: 0, free: 0, most: 0 };
      const strided = { ...window, stride };
      const groups = new Map();
      for (let group = 0; group < window.dilation; group++) {
        const length = groupLength(window, group);
        groups.set(length, (groups.get(length) ?? 0) + 1);
      }
      for (const [length, times] of groups) {
        for (let tile = 0; tile < ceilDiv(length, queryTile); tile++) {
          const found = visitsOf(strided, length, tile, queryTile, keyTile);
          row.visited += times * (found.last - found.first);
          row.free += times * (found.freeLast - found.freeFirst);
          row.most = Math.max(row.most, found.last - found.first);
        }
      }
      row.pairs = pairsOf(strided);
      return row;
    });
  }

  // Without the rows that one of a finer stride reaches in every count.
  function undominated(rows) {
    const kept = [];
    for (const row of rows) {
      const beaten = kept.some(
        (rival) =>
          rival.visited <= row.visited && rival.free >= row.free && rival.pairs >= row.pairs,
      );
      if (!beaten) kept.push(row);
    }
    return kept;
  }

  // Points {speedup, pairs, coarseness} that no other reaches in speed-up and pairs at the same or
  // a smaller coarseness.
  function pareto(points) {
    const order = [...points].sort(
      (a, b) => a.coarseness - b.coarseness || b.speedup - a.speedup || b.pairs - a.pairs,
    );
    const kept = [];
    let finer = []; // speed-ups falling, pairs rising
    for (let first = 0; first < order.length;) {
      let last = first;
      while (last < order.length && order[last].coarseness === order[first].coarseness) last++;
      const level = [];
      let most = -Infinity;
      for (const point of order.slice(first, last)) {
        if (point.pairs > most) {
          most = point.pairs;
          if (!finer.some((one) => one.speedup >= point.speedup && one.pairs >= point.pairs)) {
            level.push(point);
          }
        }
      }
      kept.push(...level);
      const merged = [...finer, ...level].sort(
        (a, b) => b.speedup - a.speedup || b.pairs - a.pairs,
      );
      finer = merged.filter(
        (point, n) => !merged.slice(0, n).some((other) => other.pairs >= point.pairs),
      );
      first = last;
    }
    return kept;
  }

  const choiceOf = (settings, [queryTile, keyTile], rows, mask) => {
    const tokens = product(settings.layout);
    const [querySize, keySize] = [product(queryTile), product(keyTile)];
    const dense = ceilDiv(tokens, querySize) * ceilDiv(tokens, keySize);
    const [visited, free, pairs, most, coarseness] = [
      "visited",
      "free",
      "pairs",
      "most",
      "stride",
    ].map((name) => product(rows.map((row) => row[name])));
    return {
      kernelSize: settings.window,
      stride: rows.map((row) => row.stride),
      queryTile,
      keyTile,
      sparsity: 1 - pairs / tokens ** 2,
      flopSpeedup: tokens ** 2 / pairs,
      tileSpeedup: dense / visited,
      worstTileSpeedup: ceilDiv(tokens, keySize) / most,
      speedup: dense / (visited + mask * (visited - free)),
      blockSparse: visited === free,
      pairs,
      coarseness,
    };
  };

  // The strides of a window that no other beats in pairs, speed-up and fineness at once, fastest
  // first; null where there are more combinations than `limit`.
  function search(settings, limit = Infinity) {
    const gpu = constants.gpus[settings.gpu];
    const windows = windowsOf(settings);
    const pool = [];
    for (const tiles of tileOptions({ ...settings, tiling: "permuted" }, gpu)) {
      let tables = [];
      for (const thin of [false, true]) {
        tables = windows.map((window, m) =>
          undominated(tabulate(window, tiles[0][m], tiles[1][m], thin)),
        );
        if (product(tables.map((table) => table.length)) <= constants.allProducts) break;
      }
      if (product(tables.map((table) => table.length)) > limit) return null;
      // Of equal choices the first in this order wins.
      const last = tables.length - 1;
      tables[last] = [...tables[last]].sort((a, b) => a.pairs - b.pairs);
      let products = [[]];
      for (const table of tables) {
        products = products.flatMap((rows) => table.map((row) => [...rows, row]));
      }
      pool.push(...pareto(products.map((rows) => choiceOf(settings, tiles, rows, gpu.mask))));
    }
    return pareto(pool).sort((a, b) => b.speedup - a.speedup);
  }

  // What `search` would say of the stride that is set, with these tiles.
  function choice(settings, queryTile, keyTile) {
    const rows = windowsOf(settings).map((window, m) => {
      const own = tilesAlong(window, queryTile[m], keyTile[m], false);
      return {
        stride: window.stride,
        pairs: pairsOf(window),
        visited: sum(own.visited),
        free: sum(own.free),
        most: own.visited.reduce((a, b) => Math.max(a, b)),
      };
    });
    return choiceOf(settings, [queryTile, keyTile], rows, constants.gpus[settings.gpu].mask);
  }

  // ---- what does not fit ----

  const tuple = (each) => `(${each.join(", ")}${each.length === 1 ? "," : ""})`;

  // Why the windows do not fit the layout, in a sentence; empty where they do.
  function misfit({ layout, window, stride, dilation }) {
    for (const [m, length] of layout.entries()) {
      const [k, s, d] = [window[m], stride[m], dilation[m]];
      if (k * d > length) {
        // Windows and dilations of 1 fit every layout.
        const given = [
          ["window", k, window],
          ["dilation", d, dilation],
        ].filter((one) => one[1] > 1);
        const numbers = given.map((one) => one[1]).join(" * ");
        const received = given.length > 1 ? `${numbers} = ${k * d}` : numbers;
        const every = given.map(([name, , values]) => `${name}=${tuple(values)}`).join(", ");
        return (
          `${given.map((one) => one[0]).join(" times ")} must not exceed the tokens along a ` +
          `dimension; received ${received} > ${length} in dimension ${m} (${every}, token layout ` +
          `${tuple(layout)}).`
        );
      }
      if (s > k) {
        return (
          `stride must not exceed window; received ${s} > ${k} in dimension ${m} ` +
          `(stride=${tuple(stride)}, window=${tuple(window)}).`
        );
      }
    }
    return "";
  }

  // The nearest number of tokens, not below the window, with which no tile needs a mask.
  function maskFreeLength(window, queryTile, keyTile) {
    for (let distance = 0; distance < 4 * Math.max(queryTile, keyTile); distance++) {
      for (const length of [window.length + distance, window.length - distance]) {
        if (length < window.size) continue;
        const tiles = ceilDiv(length, queryTile);
        let free = true;
        for (let tile = 0; free && tile < tiles; tile++) {
          const found = visitsOf(window, length, tile, queryTile, keyTile);
          free = found.first === found.freeFirst && found.last === found.freeLast;
        }
        if (free) return length;
      }
    }
    return null;
  }

  // A layout's size, as a sentence says it.
  function sizeOf(model, layout) {
    const [rows, columns] = layout.slice(-2);
    const pixels = `${rows * model.pixels}x${columns * model.pixels} px`;
    return layout.length < 3 ? pixels : `${(layout[0] - 1) * model.frames + 1} frames of ${pixels}`;
  }

  // How to do without masks, in a sentence; empty where none is needed. Without dilation, in tiles
  // on a grid of the layout.
  function advice(settings, queryTile, keyTile, name = "", model = null) {
    const nearest = windowsOf(settings).map((window, m) =>
      maskFreeLength(window, queryTile[m], keyTile[m]),
    );
    if (by(nearest) === by(settings.layout)) return "";
    const named = name ? ` (${name})` : "";
    const it = `a window of ${by(settings.window)} at stride ${by(settings.stride)}${named}`;
    if (nearest.includes(null)) {
      return `${it} always needs masks; \`conceptax gna search\` lists strides that do not.`;
    }
    const size = model ? ` (${sizeOf(model, nearest)})` : "";
    return `${by(settings.layout)} tokens need masks for ${it}; ${by(nearest)}${size} needs none.`;
  }

  // ---- a query, for drawing ----

  // What a query's tile visits, and what the query sees: for each token 0 (skipped), 1 (in a key tile
  // without a mask) or 2 (in one with a mask), plus 4 where the query sees it and 8 in its own tile.
  function around(settings, query, queryTile, keyTile) {
    const { tiling, layout } = settings;
    const windows = windowsOf(settings);
    const tokens = new Uint8Array(product(layout));
    const masks = windows.map((window, m) => tally(window, [query[m]]));
    let counts;
    if (tiling === "single-dim") {
      const flat = query.reduce((total, x, m) => total * layout[m] + x, 0);
      const tile = floorDiv(flat, queryTile[0]);
      const found = flatTile(windows, tile, queryTile[0], keyTile[0]);
      counts = { visited: sum(found.visited), free: sum(found.free) };
      tokens.forEach((_, n) => {
        const key = floorDiv(n, keyTile[0]);
        if (found.visited[key]) tokens[n] = found.free[key] ? 1 : 2;
        if (floorDiv(n, queryTile[0]) === tile) tokens[n] += 8;
      });
    } else {
      const kinds = [];
      const own = [];
      counts = { visited: 1, free: 1 };
      for (const [m, window] of windows.entries()) {
        const group = query[m] % window.dilation;
        const length = groupLength(window, group);
        const tile = floorDiv(floorDiv(query[m], window.dilation), queryTile[m]);
        const found = visitsOf(window, length, tile, queryTile[m], keyTile[m], tiling === "fused");
        counts.visited *= found.last - found.first;
        counts.free *= found.freeLast - found.freeFirst;
        kinds.push(new Uint8Array(window.length));
        own.push(new Uint8Array(window.length));
        for (let j = 0; j < length; j++) {
          const x = j * window.dilation + group;
          const key = floorDiv(j - found.origin, keyTile[m]);
          const free = key >= found.freeFirst && key < found.freeLast;
          if (key >= found.first && key < found.last) kinds[m][x] = free ? 1 : 2;
          own[m][x] = Number(floorDiv(j, queryTile[m]) === tile);
        }
      }
      eachToken(kinds, (flat) => {
        tokens[flat] = Math.max(...unravel(flat, layout).map((x, m) => kinds[m][x]));
      });
      eachToken(own, (flat) => {
        tokens[flat] += 8;
      });
    }
    let keys = 0;
    eachToken(masks, (flat) => {
      tokens[flat] += 4;
      keys++;
    });
    return { tokens, keys, ...counts };
  }

  return {
    advice,
    around,
    by,
    choice,
    denseStepsOf,
    endToEnd,
    misfit,
    product,
    search,
    simulate,
    simulateModel,
    sizeOf,
    speedups,
  };
};

if (typeof module !== "undefined") module.exports = createSimulator;
