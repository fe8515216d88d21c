/* The engine of the page over HTTP: lmdist-serve's OpenAI API, beside which the page lies.

   The page knows no address, key or protocol; this file knows no element of the page. A page without a server has another
   file with the same `open` (docs/browser.md). Errors are sentences for people. */

const UNKNOWN = "<unk>";
const IN_CLIENT = "model prompt max_tokens temperature top_p presence_penalty frequency_penalty seed".split(" ");
const OPENAI_NAMES = { max_new_tokens: "max_tokens" };

class Server {
  constructor(askKey) {
    this.askKey = askKey;
    this.key = ""; // in memory only
    this.base = new URL("v1/", document.baseURI);
  }

  /** Return a response with status 200; asks for the API key as often as the server refuses it. */
  async fetch(path, body, signal) {
    for (;;) {
      const headers = this.key ? { Authorization: `Bearer ${this.key}` } : {};
      const post = { method: "POST", headers: { ...headers, "Content-Type": "application/json" }, body: JSON.stringify(body) };
      const response = await fetch(new URL(path, this.base), { ...(body ? post : { headers }), signal }).catch((error) => {
        throw signal?.aborted ? error : new Error("The server cannot be reached. Is lmdist-serve still running?");
      });
      if (response.ok) return response;
      const message = await messageOf(response);
      if (response.status !== 401) throw new Error(message);
      const key = await this.askKey?.(this.key ? message : "This server answers only with an API key.");
      if (!key) throw new Error("Without an API key this server does not answer.");
      this.key = key;
    }
  }

  async complete(body, signal) {
    const { choices } = await (await this.fetch("completions", body, signal)).json();
    return choices[0];
  }
}

async function messageOf(response) {
  const { error } = await response.json().catch(() => ({}));
  const seconds = Number(response.headers.get("Retry-After"));
  if (response.status === 429) return `The server is busy. Try again in ${seconds > 1 ? `${seconds} seconds` : "a second"}.`;
  return error?.message ?? `The server answered with status ${response.status}.`;
}

/** Yield the objects of a stream of server-sent events until its `[DONE]`. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Error("The connection to the server broke.");
    });
    if (done) throw new Error("The server ended the text before it was complete.");
    const lines = (waiting + value).split(/\r?\n/);
    waiting = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

/** Return the place in UTF-16 of each code point of a text, and of its end: the server counts in code points. */
function placesOf(text) {
  const places = [0];
  for (const character of text) places.push(places.at(-1) + character.length);
  return places;
}

const quotedForShell = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const inPython = (value) => (typeof value === "boolean" ? (value ? "True" : "False") : JSON.stringify(value));

function snippetsOf(server, body) {
  const url = new URL("completions", server.base).href;
  const [known, own] = [true, false].map((isKnown) =>
    Object.entries(body).filter(([name]) => IN_CLIENT.includes(name) === isKnown),
  );
  const lines = known.map(([name, value]) => `    ${name}=${inPython(value)},`);
  if (own.length) {
    lines.push(`    extra_body={${own.map(([name, value]) => `${JSON.stringify(name)}: ${inPython(value)}`).join(", ")}},`);
  }
  const authorization = server.key ? ` \\\n  -H "Authorization: Bearer $LMDIST_API_KEY"` : "";
  const key = server.key ? `os.environ["LMDIST_API_KEY"]` : `"none"`;
  return {
    curl:
      `curl ${url} \\\n  -H 'Content-Type: application/json'${authorization} \\\n` +
      `  -d ${quotedForShell(JSON.stringify(body))}`,
    python:
      `${server.key ? "import os\n\n" : ""}from openai import OpenAI  # pip install openai\n\n` +
      `client = OpenAI(base_url=${JSON.stringify(server.base.href)}, api_key=${key})\n` +
      `completion = client.completions.create(\n${lines.join("\n")}\n)\nprint(completion.choices[0].text)`,
  };
}

/** Return the engine; `askKey(message)` is called where the server wants an API key, and returns one or nothing. */
export async function open({ askKey } = {}) {
  const server = new Server(askKey);
  const { data } = await (await server.fetch("models")).json();
  const { id, lmdist } = data[0];
  const defaultBeams = lmdist.options.find(({ name }) => name === "num_beams").default;

  const bodyOf = (prompt, options) => ({
    model: id,
    prompt,
    ...Object.fromEntries(Object.entries(options).map(([name, value]) => [OPENAI_NAMES[name] ?? name, value])),
  });

  return {
    model: { name: id, ...lmdist },

    async *generate({ prompt, options, signal }) {
      const body = bodyOf(prompt, options);
      if ((options.num_beams ?? defaultBeams) > 1) {
        yield await server.complete(body, signal); // a beam search has no text before its end
        return;
      }
      for await (const { choices } of events(await server.fetch("completions", { ...body, stream: true }, signal))) {
        if (choices.length) yield { text: choices[0].text, finish_reason: choices[0].finish_reason };
      }
    },

    async nextWords(prompt, k, signal) {
      // With min_new_tokens there is a first token, and its alternatives, also where the end of the text is likeliest.
      const first = { max_tokens: 1, min_new_tokens: 1, temperature: 0, num_beams: 1 };
      const body = { model: id, prompt, ...first, logprobs: k + 1 };
      const { logprobs } = await server.complete(body, signal);
      return Object.entries(logprobs.top_logprobs[0] ?? {})
        .filter(([word]) => word !== UNKNOWN)
        .map(([word, logProbability]) => ({ word, probability: Math.exp(logProbability) }))
        .sort((one, other) => other.probability - one.probability)
        .slice(0, k);
    },

    async score(text, signal) {
      if (!text.trim()) return [];
      const body = { model: id, prompt: text, echo: true, max_tokens: 0, logprobs: 0 };
      const { logprobs } = await server.complete(body, signal);
      const places = placesOf(text);
      const starts = logprobs.text_offset.map((offset) => places[offset]);
      return logprobs.tokens.map((token, number) => ({
        token,
        start: starts[number],
        end: starts[number] + text.slice(starts[number], starts[number + 1]).trimEnd().length,
        log_probability: logprobs.token_logprobs[number],
        unknown: logprobs.unknown[number],
      }));
    },

    snippets: ({ prompt, options }) => snippetsOf(server, bodyOf(prompt, options)),
  };
}
