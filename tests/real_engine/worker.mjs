// A trivial Workflow, and the documented REST paths in front of Cloudflare's engine.
//
// The engine validates, and its own API answers list, get, counts, status and deletion. It has batch-create only as a
// binding, and no authentication. So these are choices of this file, and no evidence of what production does:
//   - authentication: any account, one token; a 401 for any other token;
//   - the statuses and codes where batch-create is refused: 400 and 10002 for what the engine refuses, 500 and 10001
//     where it fails, 404 and 10200 for a missing workflow, 404 and 7003 for any other path;
//   - `status`, `version_id` and `workflow_id` of what was created: the engine returns ids;
//   - the list's `cursor`: the engine's list has pages by number, so a cursor is the number of the next page.
import { WorkflowEntrypoint } from "cloudflare:workers";

const EXPLORER = "/cdn-cgi/local/explorer/api";
const PATH = /^\/client\/v4\/accounts\/[^/]+(\/workflows\/([^/]+)(?:\/(.*))?)$/;
const NO_ID = "00000000-0000-4000-8000-000000000000";

export class Trivial extends WorkflowEntrypoint {
  async run(event, step) {
    const { sleep, fail } = event.payload ?? {};
    if (sleep) await step.sleep("sleep", sleep);
    if (fail) throw new Error("asked to fail");
    return event.payload;
  }
}

export default {
  async fetch(request, env) {
    const url = new URL(request.url);
    const [, path, workflow, below] = PATH.exec(url.pathname) ?? [];
    if (!path) return refusal(404, 7003, `Could not route to ${url.pathname}`);
    const known = request.headers.get("authorization") === `Bearer ${env.TOKEN}`;
    if (!known) return refusal(401, 10000, "Authentication error");
    if (request.method === "POST" && below === "instances/batch") return create(env[workflow], await request.text());
    if (request.method === "GET" && below === "instances") return list(request, url, path);
    return explore(request, url, path);
  },
};

async function create(workflow, text) {
  if (!workflow?.createBatch) return refusal(404, 10200, "workflows.api.error.workflow.not_found");
  try {
    const made = await workflow.createBatch(inBinding(JSON.parse(text)));
    return success(Array.isArray(made) ? made.map(described) : made);
  } catch (error) {
    const refused = error instanceof SyntaxError || error.message.startsWith("WorkflowError");
    return refused ? refusal(400, 10002, error.message) : refusal(500, 10001, String(error));
  }
}

async function list(request, url, path) {
  const query = url.searchParams;
  if (query.has("cursor")) query.set("page", query.get("cursor"));
  query.delete("cursor");
  const answer = await explore(request, url, path);
  if (!answer.ok) return answer;
  const listed = await answer.json();
  const { page, total_pages: pages } = listed.result_info;
  if (page < pages) listed.result_info.cursor = String(page + 1);
  return Response.json(listed);
}

function explore(request, url, path) {
  const headers = { "content-type": "application/json" };
  return fetch(`${url.origin}${EXPLORER}${path}${url.search}`, { method: request.method, body: request.body, headers });
}

// Translates the documented names to the binding's. Values of an undocumented type pass unchanged.
function inBinding(body) {
  if (Array.isArray(body)) return body.map(item);
  return Array.isArray(body?.instances) ? { ...body, instances: body.instances.map(item) } : body;
}

const retention = renaming({ success_retention: ["successRetention"], error_retention: ["errorRetention"] });
const item = renaming({
  instance_id: ["id"],
  params: ["params"],
  instance_retention: ["retention", retention],
  location_hint: ["locationHint"],
});

function renaming(names) {
  return (value) => {
    if (value === null || typeof value !== "object" || Array.isArray(value)) return value;
    const known = Object.entries(names).filter(([name]) => name in value);
    return Object.fromEntries(known.map(([name, [other, change = same]]) => [other, change(value[name])]));
  };
}

const same = (value) => value;
const described = ({ id }) => ({ id, status: "queued", version_id: NO_ID, workflow_id: NO_ID });
const success = (result) => Response.json({ success: true, errors: [], messages: [], result });
const refusal = (status, code, message) =>
  Response.json({ success: false, errors: [{ code, message }], messages: [], result: null }, { status });
