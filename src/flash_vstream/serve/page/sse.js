// Parses server-sent events per the HTML standard: comments, keep-alives, any line ending, multiple data lines.

// The events of a stream of text chunks, as { event, data }.
export async function* parseEvents(chunks) {
  let waiting = "";
  let event = "";
  let data = [];
  for await (const chunk of chunks) {
    waiting += chunk;
    // A carriage return at the end of a chunk may be the first half of a line ending.
    const lines = waiting.split(/\r\n|\n|\r(?!$)/);
    waiting = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (data.length) yield { event: event || "message", data: data.join("\n") };
        [event, data] = ["", []];
        continue;
      }
      const [, field, value] = line.match(/^([^:]*):? ?(.*)$/s); // a comment has an empty field
      if (field === "event") event = value;
      else if (field === "data") data.push(value);
    }
  }
}

// The chunks of a response as text.
export async function* textOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
  } finally {
    reader.cancel().catch(() => {});
  }
}
