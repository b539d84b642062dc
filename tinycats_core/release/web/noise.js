// The noise of an image, number for number that of NumPy in Python:
//   np.random.Generator(np.random.Philox(key=[seed, index])).standard_normal((3, size, size), np.float32)
// Philox 4x64-10 (Salmon et al. 2011) and the ziggurat of 256 layers (Marsaglia & Tsang 2000), as NumPy has them.
// A word of 64 bits is a pair of 32-bit words, the low one first.
"use strict";

const PHILOX = {
  multipliers: [[0xe14c6c93, 0xd2e7470e], [0x95121157, 0xca5a8263]],
  weyl: [[0x7f4a7c15, 0x9e3779b9], [0x84caa73b, 0xbb67ae85]],
  rounds: 10,
};

// Return the exact product of two 32-bit words as [low, high].
function multiply32(a, b) {
  const a0 = a & 0xffff, a1 = a >>> 16, b0 = b & 0xffff, b1 = b >>> 16;
  const low = a0 * b0;
  const middle = a1 * b0 + Math.floor(low / 65536);
  const cross = a0 * b1 + (middle % 65536);
  return [((cross % 65536) * 65536 + (low % 65536)) >>> 0, a1 * b1 + Math.floor(middle / 65536) + Math.floor(cross / 65536)];
}

// Return the four 32-bit words of the product of two 64-bit words.
function multiply64(a, low, high) {
  const p = multiply32(a[0], low), q = multiply32(a[1], low), r = multiply32(a[0], high), s = multiply32(a[1], high);
  const second = p[1] + q[0] + r[0];
  const third = Math.floor(second / 4294967296) + q[1] + r[1] + s[0];
  return [p[0], second >>> 0, third >>> 0, (Math.floor(third / 4294967296) + s[1]) >>> 0];
}

// Return block `counter` of the generator with this key, four 32-bit words: eight 32-bit words, in the order of NumPy.
function philox(counter, key) {
  let words = [counter >>> 0, Math.floor(counter / 4294967296), 0, 0, 0, 0, 0, 0];
  const k = [...key];
  for (let round = 0; round < PHILOX.rounds; round++) {
    if (round > 0) {
      PHILOX.weyl.forEach(([low, high], half) => {
        const sum = k[2 * half] + low;
        k[2 * half] = sum >>> 0;
        k[2 * half + 1] = (k[2 * half + 1] + high + (sum > 0xffffffff ? 1 : 0)) >>> 0;
      });
    }
    const a = multiply64(PHILOX.multipliers[0], words[0], words[1]);
    const b = multiply64(PHILOX.multipliers[1], words[4], words[5]);
    words = [
      (b[2] ^ words[2] ^ k[0]) >>> 0, (b[3] ^ words[3] ^ k[1]) >>> 0, b[0], b[1],
      (a[2] ^ words[6] ^ k[2]) >>> 0, (a[3] ^ words[7] ^ k[3]) >>> 0, a[0], a[1],
    ];
  }
  return words;
}

const ZIGGURAT_R = 3.6541528853610088; // where the tail begins
const ZIGGURAT = ziggurat(ZIGGURAT_R, 0.00492867323399); // the area of a layer

// Return the tables of the layers: limits `k`, widths `w` of one step of 23 bits, and densities `f`.
function ziggurat(r, area) {
  const density = (x) => Math.exp(-0.5 * x * x), steps = 2 ** 23;
  const k = new Uint32Array(256), w = new Float32Array(256), f = new Float32Array(256);
  k[0] = Math.trunc((r * density(r)) / area * steps);
  w[0] = area / density(r) / steps;
  f[0] = 1;
  w[255] = r / steps;
  f[255] = density(r);
  let before = r;
  for (let layer = 254; layer > 0; layer--) {
    const x = Math.sqrt(-2 * Math.log(area / before + density(before)));
    k[layer + 1] = Math.trunc((x / before) * steps);
    w[layer] = x / steps;
    f[layer] = density(x);
    before = x;
  }
  return { k, w, f };
}

// Return the noise of an image: 3 * size * size standard normal numbers. Seed and index are integers below 2 ** 53.
function noise(seed, index, size) {
  const key = [seed >>> 0, Math.floor(seed / 4294967296), index >>> 0, Math.floor(index / 4294967296)];
  const { k, w, f } = ZIGGURAT, single = Math.fround;
  let words = [], used = 8, counter = 0;
  const next = () => {
    if (used === 8) {
      words = philox(++counter, key);
      used = 0;
    }
    return words[used++];
  };
  const uniform = () => single((next() >>> 8) * 2 ** -24);
  const normal = () => {
    for (;;) {
      const bits = next(), layer = bits & 255, size = (bits >>> 9) & 0x7fffff;
      const x = single(size * w[layer]) * (bits & 256 ? -1 : 1);
      if (size < k[layer]) return x;
      if (layer > 0) {
        if (single(single(f[layer - 1] - f[layer]) * uniform()) + f[layer] < Math.exp(-0.5 * x * x)) return x;
        continue;
      }
      for (;;) {
        const beyond = single(-single(1 / ZIGGURAT_R) * single(Math.log1p(-uniform())));
        const height = -single(Math.log1p(-uniform()));
        if (single(height + height) > single(beyond * beyond)) {
          return single(single(ZIGGURAT_R) + beyond) * (size & 256 ? -1 : 1);
        }
      }
    }
  };
  return Float32Array.from({ length: 3 * size * size }, normal);
}
