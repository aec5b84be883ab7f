// Parses a multipart/x-mixed-replace response whose parts have a Content-Length.

const HEADER_END = [13, 10, 13, 10];

function join(first, second) {
  const both = new Uint8Array(first.length + second.length);
  both.set(first);
  both.set(second, first.length);
  return both;
}

function headerEnd(bytes) {
  for (let at = bytes.indexOf(13); at >= 0; at = bytes.indexOf(13, at + 1)) {
    if (HEADER_END.every((byte, i) => bytes[at + i] === byte)) return at;
  }
  return -1;
}

// Yields { time, bytes } for each picture as it arrives.
export async function* parsePictures(chunks) {
  let waiting = new Uint8Array();
  for await (const chunk of chunks) {
    waiting = join(waiting, chunk);
    for (;;) {
      const end = headerEnd(waiting);
      if (end < 0) break;
      const head = new TextDecoder().decode(waiting.subarray(0, end));
      const length = Number(head.match(/^content-length: *(\d+)/im)[1]);
      const from = end + HEADER_END.length;
      if (waiting.length < from + length) break;
      yield { time: Number(head.match(/^x-stream-time: *(\S+)/im)?.[1] ?? NaN), bytes: waiting.slice(from, from + length) };
      waiting = waiting.slice(from + length);
    }
  }
}

// The chunks of a response as bytes.
export async function* bytesOf(response) {
  const reader = response.body.getReader();
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
  } finally {
    reader.cancel().catch(() => {});
  }
}
