// Times llama.cpp, as node-llama-cpp brings it: node llama_cpp.mjs LIBRARY GGUF THREADS PROMPT_TOKENS GENERATED_TOKENS
import {pathToFileURL} from "node:url";

const [library, modelPath] = process.argv.slice(2, 4);
const [threads, prompt, generated] = process.argv.slice(4).map(Number);
const {getLlama} = await import(pathToFileURL(library));
const llama = await getLlama({gpu: false, build: "never", maxThreads: threads, logLevel: "error"});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({contextSize: 1024, batchSize: 512, threads});
const tokens = Array.from({length: prompt}, (_, i) => 1000 + 7919 * i % 40000);
const turns = [];
for (let turn = 0; turn < 2; turn++) {  // the first warms up
    const sequence = context.getSequence();
    const started = performance.now();
    let first = 0, count = 0;
    for await (const _ of sequence.evaluate(tokens, {temperature: 0, yieldEogToken: true})) {
        if (count === 0) first = performance.now();
        if (++count > generated) break;
    }
    turns.push({first: (first - started) / 1000, rate: 1000 * (count - 1) / (performance.now() - first)});
    sequence.dispose();
}
console.log(JSON.stringify(turns[1]));
process.exit(0);
