// An image as evaluation wants it, as load_centre of shufflenet/reading/image.py has it: for the
// page that export.py --web writes, and for clients (docs/deploy.md).

const BITS = 22; // of a weight: with the 8 of a pixel they fit into 32
const HALF = 2 ** (BITS - 1);

// 8-bit RGB or RGBA (height, width, channels) to the network's input, Float32Array (3, crop, crop):
// the shorter side resized to `resize` pixels, bilinear with antialiasing, the centre cut out.
export function preprocess(pixels, width, height, { resize, crop, mean, std }) {
  const [across, down] = [width, height].map((length) => {
    const resized = Math.floor((resize * length) / Math.min(width, height));
    const half = (resized - crop) / 2;
    const first = half % 1 ? 2 * Math.round(half / 2) : half; // to even, as Python rounds
    return weights((first * length) / resized, ((first + crop) * length) / resized, length, crop);
  });
  const channels = pixels.length / (width * height);
  const line = channels * width;
  let small; // (crop, crop, 3)
  // The order counts, since each pass is rounded; so Pillow chooses it from version 13 on.
  if (height > crop && height - crop > 2 * (width - crop)) {
    small = pass(pixels, down, width, [line, channels], [3 * width, 3]);
    small = pass(small, across, crop, [3, 3 * width], [3, 3 * crop]);
  } else {
    small = pass(pixels, across, height, [channels, line], [3, 3 * crop]);
    small = pass(small, down, crop, [3 * crop, 3], [3 * crop, 3]);
  }
  const x = new Float32Array(3 * crop * crop);
  for (let i = 0; i < x.length; i++) {
    const channel = i % 3;
    const value = (small[i] / 255 - mean[channel]) / std[channel];
    x[channel * crop * crop + (i - channel) / 3] = value;
  }
  return x;
}

// Which pixels make each of `count` new ones of those from `low` to `high`: the first, and weights.
function weights(low, high, length, count) {
  [low, high] = [Math.fround(low), Math.fround(high)]; // float32 in Pillow
  const scale = Math.fround(high - low) / count;
  const reach = Math.max(1, scale);
  return Array.from({ length: count }, (_, i) => {
    const middle = low + (i + 0.5) * scale;
    const first = Math.max(0, Math.floor(middle - reach + 0.5));
    const last = Math.min(length, Math.floor(middle + reach + 0.5));
    const parts = Array.from({ length: last - first }, (_, j) =>
      Math.max(0, 1 - Math.abs((first + j + 0.5 - middle) * (1 / reach))));
    const sum = parts.reduce((a, b) => a + b);
    return [first, Int32Array.from(parts, (part) => Math.round((part / sum) * 2 ** BITS))];
  });
}

// Resizes `lines` lines, whose pixels are `step` values apart and they themselves `stride`; those
// of the result are toStep and toStride apart.
function pass(pixels, taps, lines, [step, stride], [toStep, toStride]) {
  const result = new Uint8Array(3 * taps.length * lines);
  for (const [i, [first, parts]] of taps.entries()) {
    for (let line = 0; line < lines; line++) {
      let [from, red, green, blue] = [line * stride + first * step, HALF, HALF, HALF];
      for (let j = 0; j < parts.length; j++) {
        red += parts[j] * pixels[from];
        green += parts[j] * pixels[from + 1];
        blue += parts[j] * pixels[from + 2];
        from += step;
      }
      const to = line * toStride + i * toStep;
      result[to] = red >> BITS;
      result[to + 1] = green >> BITS;
      result[to + 2] = blue >> BITS;
    }
  }
  return result;
}
