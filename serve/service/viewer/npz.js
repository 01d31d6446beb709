/**
 * Reads what `numpy.savez` writes: a zip of .npy files, stored or deflated.
 *
 * Only uint8 arrays in C order, which is all that the service sends.
 */

const END_OF_DIRECTORY = 0x06054b50;
const DIRECTORY_ENTRY = 0x02014b50;
const STORED = 0;
const DEFLATED = 8;

/**
 * @param {ArrayBuffer} buffer the file
 * @returns {Promise<Map<string, {shape: number[], data: Uint8Array}>>} the arrays by name
 */
export async function readNpz(buffer) {
  const arrays = new Map();
  for (const entry of directory(new DataView(buffer))) {
    const bytes = await content(buffer, entry);
    arrays.set(entry.name.replace(/\.npy$/, ""), parseNpy(bytes));
  }
  return arrays;
}

/** The sizes are right in the directory only: numpy leaves the entries' own headers open. */
function directory(view) {
  const end = findEnd(view);
  const entries = [];
  let at = view.getUint32(end + 16, true);
  for (let left = view.getUint16(end + 10, true); left > 0; left--) {
    if (view.getUint32(at, true) !== DIRECTORY_ENTRY) throw new Error("the zip's directory is damaged");
    const nameLength = view.getUint16(at + 28, true);
    entries.push({
      method: view.getUint16(at + 10, true),
      size: view.getUint32(at + 20, true),
      offset: view.getUint32(at + 42, true),
      name: new TextDecoder().decode(new Uint8Array(view.buffer, at + 46, nameLength)),
    });
    at += 46 + nameLength + view.getUint16(at + 30, true) + view.getUint16(at + 32, true);
  }
  return entries;
}

function findEnd(view) {
  for (let at = view.byteLength - 22; at >= 0; at--) {
    if (view.getUint32(at, true) === END_OF_DIRECTORY) return at;
  }
  throw new Error("the answer is not a zip file");
}

async function content(buffer, { method, size, offset }) {
  const header = new DataView(buffer, offset, 30);
  const start = offset + 30 + header.getUint16(26, true) + header.getUint16(28, true);
  const bytes = new Uint8Array(buffer, start, size);
  if (method === STORED) return bytes;
  if (method !== DEFLATED) throw new Error(`zip method ${method} is unknown`);
  const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Uint8Array(await new Response(inflated).arrayBuffer());
}

function parseNpy(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const version = view.getUint8(6);
  const start = version === 1 ? 10 : 12;
  const length = version === 1 ? view.getUint16(8, true) : view.getUint32(8, true);
  const header = new TextDecoder().decode(bytes.subarray(start, start + length));
  const match = /'descr': '\|u1', 'fortran_order': False, 'shape': \(([\d, ]*)\)/.exec(header);
  if (!match) throw new Error(`the array is not uint8 in C order: ${header.trim()}`);
  const shape = match[1].split(",").map((size) => size.trim()).filter(Boolean).map(Number);
  const data = bytes.subarray(start + length);
  if (data.length !== shape.reduce((product, size) => product * size, 1)) {
    throw new Error("the array is truncated");
  }
  return { shape, data };
}
