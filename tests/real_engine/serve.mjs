// node serve.mjs PACKAGES STATE WORKFLOW...: the engine, on a free port of this machine, until SIGTERM or the end of
// stdin. It prints its base URL on stdout when it accepts requests.
//
// PACKAGES: the folder whose node_modules hold miniflare. STATE: a folder for its state, removed at the end; an absolute
// path, or the list answers 500. TOKEN, in the environment: the token that it accepts.
import { rm } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

const [packages, state, ...workflows] = process.argv.slice(2);
const { Miniflare, convertV4MiniflareOptions } = createRequire(join(packages, "package.json"))("miniflare");

const engine = new Miniflare(
  convertV4MiniflareOptions({
    host: "127.0.0.1",
    port: 0,
    cf: false, // otherwise it looks up its location over the network
    logRequests: false,
    unsafeLocalExplorer: true, // the API of list, get, counts, status and delete
    resourcePersistencePath: state,
    workers: [
      {
        name: "main",
        modules: true,
        rootPath: fileURLToPath(new URL(".", import.meta.url)),
        scriptPath: "worker.mjs",
        compatibilityDate: "2026-07-01",
        bindings: { TOKEN: process.env.TOKEN },
        workflows: Object.fromEntries(workflows.map((name) => [name, { name, className: "Trivial" }])),
      },
    ],
  }),
);

console.log(`${await engine.ready}client/v4`);

// The parent has closed the pipe, or ended. (At SIGTERM, miniflare ends its runtime and this process by itself.)
process.stdin.resume().on("end", async () => {
  await engine.dispose();
  await rm(state, { recursive: true, force: true });
  process.exit(0);
});
