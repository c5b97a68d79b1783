/**
 * `buf curl` against a running dash server, with two ways of learning the schema: from the .proto files,
 * and from the server's reflection.
 *
 *     npm install && node buf_curl.mjs HOST:PORT PROTO_FOLDER
 *
 * Makes the same requests as client.mjs, and prints the same lines.
 */

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import path from "node:path";
import { fileURLToPath } from "node:url";
import healthCheck from "grpc-health-check";
import * as shared from "./checks.mjs";

const BUF = fileURLToPath(new URL("node_modules/.bin/buf", import.meta.url));
const CALL_SECONDS = 20;
// buf's exit code is the gRPC code, shifted by three bits.
const EXIT_CODES = { ok: 0, invalid_argument: 3 << 3, deadline_exceeded: 4 << 3, not_found: 5 << 3 };

const running = new Set();
process.on("exit", () => running.forEach((child) => signalGroup(child, "SIGKILL")));
process.on("SIGTERM", () => process.exit(1));

/** Signals a whole group: npm's `buf` runs the real program and does not pass signals on. */
function signalGroup(child, name) {
  try {
    process.kill(-child.pid, name);
  } catch (error) {
    if (error.code !== "ESRCH") throw error;
  }
}

/** Runs buf to its end. Calls `onOutput` with all output so far, and the child. */
function buf(flags, onOutput = () => {}) {
  return new Promise((resolve, reject) => {
    const child = spawn(BUF, ["curl", ...flags], { detached: true, stdio: ["ignore", "pipe", "pipe"] });
    running.add(child);
    const result = { code: null, stdout: "", stderr: "" };
    for (const name of ["stdout", "stderr"]) {
      child[name].setEncoding("utf8").on("data", (text) => {
        result[name] += text;
        onOutput(result, child);
      });
    }
    child.on("error", reject);
    child.on("close", (code) => {
      running.delete(child);
      resolve({ ...result, code });
    });
  });
}

/** Returns the complete messages in buf's output, one JSON document after the other. */
function messagesOf(text) {
  const parts = text.split(/(?<=^\{?\})\n/m);
  return parts.filter((part) => /^\{?\}$/m.test(part)).map((part) => JSON.parse(part));
}

/** `buf curl` with one way of learning the schema. */
class BufCurl {
  constructor(target, schema) {
    this.url = `http://${target}`;
    this.schema = schema;
  }

  flags(seconds) {
    return ["--protocol", "grpc", "--http2-prior-knowledge", "--timeout", `${seconds}s`, ...this.schema];
  }

  callFlags(method, request, seconds) {
    return [...this.flags(seconds), "--data", JSON.stringify(request), `${this.url}/${method}`];
  }

  /** Makes a call that ends with this code; returns its messages, and the error that buf prints, or null. */
  async call(method, request, code = "ok", seconds = CALL_SECONDS) {
    const result = await buf(this.callFlags(method, request, seconds));
    assert.equal(result.code, EXIT_CODES[code], `exit code ${result.code}, expected ${code}: ${result.stderr}`);
    const error = code === "ok" ? null : JSON.parse(result.stderr);
    assert.equal(error?.code ?? "ok", code);
    return { messages: messagesOf(result.stdout), error };
  }

  /** Interrupts a stream after this many messages, as with Ctrl-C, and returns them. */
  async interrupt(method, request, numMessages) {
    const { stdout, stderr } = await buf(this.callFlags(method, request, CALL_SECONDS), (result, child) => {
      if (messagesOf(result.stdout).length >= numMessages) signalGroup(child, "SIGINT");
    });
    assert.equal(JSON.parse(stderr).code, "canceled");
    return messagesOf(stdout);
  }
}

const checks = {
  async "schema"(client) {
    const { code, stdout, stderr } = await buf([...client.flags(CALL_SECONDS), "--list-services", client.url]);
    assert.equal(code, 0, stderr);
    const services = shared.SERVICES.filter((service) => stdout.split("\n").includes(service));
    assert.deepEqual(services, shared.SERVICES);
    return `${services.length} services`;
  },

  async "health Watch"(client) {
    const messages = await client.interrupt(`${shared.HEALTH_SERVICE}/Watch`, {}, 1);
    assert.deepEqual(messages, [{ status: "SERVING" }]);
    return "SERVING, then canceled";
  },

  async "health Check"(client) {
    for (const service of ["", shared.GENERATION_SERVICE, shared.MODEL_SERVICE]) {
      const { messages } = await client.call(`${shared.HEALTH_SERVICE}/Check`, { service });
      assert.deepEqual(messages, [{ status: "SERVING" }]);
    }
    await client.call(`${shared.HEALTH_SERVICE}/Check`, { service: "nothing" }, "not_found");
    return "SERVING, not_found for an unknown service";
  },

  async "GetModel"(client) {
    const [facts] = (await client.call(`${shared.MODEL_SERVICE}/GetModel`, {})).messages;
    assert.equal(facts.slotCount, 1, "the server must have one slot");
    assert.ok(facts.modes.includes("MODE_FULL_DEPTH") && facts.actions.includes("ACTION_FULL"), JSON.stringify(facts));
    return `${facts.architecture}, ${facts.layerCount} layers, ${facts.defaultMode}`;
  },

  async "Generate"(client) {
    const [answer] = (await client.call(`${shared.GENERATION_SERVICE}/Generate`, shared.TEXT_REQUEST)).messages;
    const { started, output, finished } = answer;
    assert.equal(started.seed, shared.LARGEST_SEED);
    assert.equal(started.mode, "MODE_FULL_DEPTH");
    assert.equal(output.text, shared.TEXT);
    assert.equal(output.logprobs.length, shared.NUM_TEXT_TOKENS);
    assert.equal(output.logprobs[0].top.length, 2);
    const actions = Array(shared.NUM_TEXT_TOKENS * started.layerCount).fill(shared.ACTION_FULL);
    assert.deepEqual([...Buffer.from(output.actions, "base64")], actions);
    assert.equal(finished.reason, "FINISH_REASON_LENGTH");
    assert.equal(finished.usage.outputTokenCount, shared.NUM_TEXT_TOKENS);
    return `"${output.text}", seed ${started.seed}, ${actions.length} actions`;
  },

  async "StreamGenerate"(client) {
    const { messages } = await client.call(`${shared.GENERATION_SERVICE}/StreamGenerate`, shared.SHORT_REQUEST);
    assert.ok(messages.at(0)?.started && messages.at(-1).finished, JSON.stringify(messages));
    const deltas = messages.slice(1, -1).map(({ delta }) => delta);
    assert.ok(deltas.length > 1 && deltas.every(Boolean), JSON.stringify(messages));
    assert.equal(deltas.map(({ text }) => text ?? "").join(""), "abcabc");
    return `started, ${deltas.length} deltas, finished`;
  },

  async "StreamGenerate cancelled"(client) {
    const messages = await client.interrupt(`${shared.GENERATION_SERVICE}/StreamGenerate`, shared.LONG_REQUEST, 4);
    assert.ok(!messages.some(({ finished }) => finished), "the stream has finished");
    await client.call(`${shared.GENERATION_SERVICE}/Generate`, shared.ONE_TOKEN_REQUEST, "ok", shared.SLOT_SECONDS);
    return `${messages.length - 1} deltas, canceled, the slot is free`;
  },

  async "StreamGenerate deadline"(client) {
    const method = `${shared.GENERATION_SERVICE}/StreamGenerate`;
    const { messages } = await client.call(method, shared.LONG_REQUEST, "deadline_exceeded", 1);
    assert.ok(messages.some(({ delta }) => delta), "no delta came before the deadline");
    await client.call(`${shared.GENERATION_SERVICE}/Generate`, shared.ONE_TOKEN_REQUEST, "ok", shared.SLOT_SECONDS);
    return `${messages.length - 1} deltas, deadline_exceeded, the slot is free`;
  },

  async "error details"(client) {
    for (const method of ["Generate", "StreamGenerate"]) {
      const path = `${shared.GENERATION_SERVICE}/${method}`;
      const { error } = await client.call(path, shared.WRONG_REQUEST, "invalid_argument");
      // buf prints the types of the details, and the bytes of each message.
      const decode = ({ type, value }) => [type, shared.decodeErrorType(type, Buffer.from(value, "base64"))];
      shared.checkErrorDetails(Object.fromEntries(error.details.map(decode)));
    }
    return "invalid_argument, BadRequest with 2 fields, ErrorInfo; unary and stream";
  },
};

const { target, protoFolder } = shared.start("buf curl", 120);
// The folder above the path that health.proto's package name stands for.
const healthFolder = path.resolve(healthCheck.protoPath, "../../..");
const ways = {
  "buf curl, proto files": ["--schema", protoFolder, "--schema", healthFolder],
  "buf curl, reflection": ["--reflect"],
};
for (const [name, schema] of Object.entries(ways)) {
  for (const [checkName, check] of Object.entries(checks)) {
    await shared.runCheck(name, checkName, () => check(new BufCurl(target, schema)));
  }
}
