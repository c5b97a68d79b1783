/**
 * Shared by the clients of this folder: requests, their expected answers, and a way to run and report
 * checks.
 */

import assert from "node:assert/strict";
import protoLoader from "@grpc/proto-loader";
import googleProtoFiles from "google-proto-files";

export const GENERATION_SERVICE = "dash_api.v1.GenerationService";
export const MODEL_SERVICE = "dash_api.v1.ModelService";
export const HEALTH_SERVICE = "grpc.health.v1.Health";
export const SERVICES = [GENERATION_SERVICE, MODEL_SERVICE, HEALTH_SERVICE];

/** Code points of one to four bytes in UTF-8. */
export const TEXT = "grüße 🙂";
export const NUM_TEXT_TOKENS = Buffer.byteLength(TEXT);
/** More than a JavaScript number holds exactly. */
export const LARGEST_SEED = "18446744073709551615";
/** The number of Action.FULL. */
export const ACTION_FULL = 4;
export const LOGIT_BIAS = { 7: -1.5, 200: 2 };

/** Echoes TEXT, with something of every kind of field. */
export const TEXT_REQUEST = {
  parameters: {
    text: TEXT,
    sampling: { temperature: 0, seed: LARGEST_SEED, logit_bias: LOGIT_BIAS },
    stopping: { max_new_tokens: NUM_TEXT_TOKENS },
    skip: { mode: "MODE_FULL_DEPTH" },
    output: { return_decisions: true, logprobs: 2 },
  },
};
/** Echoes "abcabc". */
export const SHORT_REQUEST = { parameters: { text: "abc", stopping: { max_new_tokens: 6 } } };
/** Holds the slot for longer than all checks take. */
export const LONG_REQUEST = { parameters: { text: "abc", stopping: { max_new_tokens: 4000 } } };
/** Is answered within SLOT_SECONDS only if the slot is free. */
export const ONE_TOKEN_REQUEST = { parameters: { text: "a", stopping: { max_new_tokens: 1 } } };
export const SLOT_SECONDS = 5;
/** Has two wrong fields. */
export const WRONG_REQUEST = {
  parameters: { text: "a", sampling: { temperature: -1 }, stopping: { max_new_tokens: 0 } },
};

// As names and strings: enums stay readable, and 64-bit numbers do not fit a JavaScript number.
export const LOADING = { keepCase: true, longs: String, enums: String, defaults: true, oneofs: true };

const errorTypes = protoLoader.loadSync(["google/rpc/status.proto", "google/rpc/error_details.proto"], {
  ...LOADING,
  json: true, // unpacks google.protobuf.Any
  includeDirs: [googleProtoFiles.getProtoPath("..")],
});

/** Decodes a google.rpc message. */
export function decodeErrorType(type, bytes) {
  return errorTypes[type].deserialize(bytes);
}

/** Checks the answer to WRONG_REQUEST: the messages in its details, by their type's name. */
export function checkErrorDetails(details) {
  const info = details["google.rpc.ErrorInfo"];
  assert.equal(`${info?.domain} ${info?.reason}`, "dash-llm INVALID_REQUEST");
  assert.ok(info.metadata.request_id, "no request_id");
  const fields = details["google.rpc.BadRequest"]?.field_violations.map(({ field }) => field);
  assert.deepEqual(fields, ["parameters.sampling.temperature", "parameters.stopping.max_new_tokens"]);
}

/** Runs a check, which returns the line's detail, and prints the line. Ends the process if it fails. */
export async function runCheck(client, name, check) {
  try {
    console.log(["ok", client, name, await check()].join(" | "));
  } catch (error) {
    const problem = error instanceof assert.AssertionError ? error.message : error.stack;
    console.log(["FAILED", client, name, problem.replaceAll(/\s+/g, " ")].join(" | "));
    process.exit(1);
  }
}

/** Returns the command's arguments. Also ends the process after `seconds`, whatever it waits for. */
export function start(client, seconds) {
  const [target, protoFolder] = process.argv.slice(2);
  if (!target || !protoFolder) {
    console.error("usage: node PROGRAM HOST:PORT PROTO_FOLDER");
    process.exit(2);
  }
  setTimeout(() => {
    console.log(`FAILED | ${client} | all checks | not done within ${seconds} s`);
    process.exit(1);
  }, seconds * 1000).unref();
  return { target, protoFolder };
}
