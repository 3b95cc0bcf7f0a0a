// Makes the calls that stdin lists, one after another, with the official TypeScript SDK; prints the result of each.
// node client.mjs FOLDER < '{"options": {...}, "calls": [{"method": "workflows.instances.get", "args": [...]}]}'
// FOLDER has the SDK in its node_modules. Lists are read over all their pages, as the SDK does.
import { createRequire } from "node:module";
import { text } from "node:stream/consumers";

const MOST_PAGES = 50; // so that repeated pages end with a failure
const { default: Cloudflare } = createRequire(`${process.argv[2]}/`)("cloudflare");

async function allPages(first) {
  const pages = [];
  for await (const page of first.iterPages()) {
    pages.push(page);
    if (pages.length > MOST_PAGES) throw new Error(`the list does not end: ${MOST_PAGES} pages and more`);
  }
  return { items: pages.flatMap((page) => page.getPaginatedItems()), infos: pages.map((page) => page.result_info) };
}

async function outcome(client, { method, args }) {
  const names = method.split(".");
  const last = names.pop();
  const resource = names.reduce((parent, name) => parent[name], client);
  try {
    const answer = await resource[last](...args);
    return { answer: answer?.iterPages ? await allPages(answer) : answer };
  } catch (error) {
    if (!(error instanceof Cloudflare.APIError)) throw error;
    return { error: error.constructor.name, status: error.status, codes: error.errors.map(({ code }) => code) };
  }
}

const { options, calls } = JSON.parse(await text(process.stdin));
const client = new Cloudflare(options);
const outcomes = [];
for (const call of calls) outcomes.push(await outcome(client, call));
console.log(JSON.stringify(outcomes));
