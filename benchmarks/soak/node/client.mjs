/**
 * @grpc/grpc-js against a running dash server, with two ways of learning the schema: from the .proto
 * files, and from the server's reflection.
 *
 *     npm install && node client.mjs HOST:PORT PROTO_FOLDER
 *
 * The server must have one slot, so that the next call notices a slot that is not given back, and a
 * worker that echoes the prompt, at least 10 ms a token. Prints `ok | client | check | detail` for each
 * check; the first that fails is printed as FAILED, and the exit code is 1.
 */

import assert from "node:assert/strict";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";
import healthCheck from "grpc-health-check";
import reflectionClient from "grpc-js-reflection-client";
import * as shared from "./checks.mjs";

const CALL_SECONDS = 20;

/** Reads the schema from .proto files, without the server's reflection. */
async function definitionsFromProtoFiles(target, protoFolder) {
  return {
    ...protoLoader.loadSync(["dash_api/v1/generation.proto", "dash_api/v1/model.proto"], {
      ...shared.LOADING,
      includeDirs: [protoFolder],
    }),
    ...protoLoader.loadSync(healthCheck.protoPath, shared.LOADING),
  };
}

/** Reads the schema from the server's reflection, without any file. */
async function definitionsFromReflection(target) {
  const reflection = new reflectionClient.GrpcReflection(target, grpc.credentials.createInsecure());
  try {
    const services = await reflection.listServices("*", null, callOptions());
    let definitions = {};
    for (const service of shared.SERVICES) {
      assert.ok(services.includes(service), `reflection does not list ${service}, only ${services}`);
      const descriptor = await reflection.getDescriptorBySymbol(service, null, callOptions());
      definitions = { ...definitions, ...descriptor.getPackageDefinition(shared.LOADING) };
    }
    return definitions;
  } finally {
    reflection.client.close();
  }
}

function callOptions(seconds = CALL_SECONDS) {
  return { deadline: Date.now() + seconds * 1000 };
}

/** Calls a unary method and waits for its answer. */
function answer(client, method, request, seconds) {
  return new Promise((resolve, reject) => {
    client[method](request, callOptions(seconds), (error, response) => (error ? reject(error) : resolve(response)));
  });
}

/** Returns the error that ends a unary call. */
async function failure(client, method, request) {
  try {
    await answer(client, method, request);
  } catch (error) {
    return error;
  }
  throw new Error(`${method} was expected to fail`);
}

/** Reads a stream to its end; returns its messages, and the error that ended it, or null. */
async function readStream(call, onMessage = () => {}) {
  const messages = [];
  try {
    for await (const message of call) {
      messages.push(message);
      onMessage(message);
    }
    return { messages, error: null };
  } catch (error) {
    return { messages, error };
  }
}

/** Returns the details in the error's trailer, by their type's name; grpc-js leaves that to its users. */
function errorDetails(error) {
  const [trailer] = error.metadata.get("grpc-status-details-bin");
  assert.ok(trailer, "there is no trailer grpc-status-details-bin");
  const status = shared.decodeErrorType("google.rpc.Status", trailer);
  assert.equal(status.code, error.code);
  assert.equal(status.message, error.details);
  return Object.fromEntries(status.details.map((detail) => [detail["@type"].split("/").pop(), detail]));
}

/**
 * Returns TEXT_REQUEST in the form that these definitions take. If they come from descriptors, the
 * protobufjs 7 in proto-loader takes a map's entries as a list, which is the same on the wire.
 */
function textRequest(definitions) {
  const { sampling } = shared.TEXT_REQUEST.parameters;
  try {
    definitions["dash_api.v1.SamplingParameters"].serialize(sampling);
    return { request: shared.TEXT_REQUEST, mapForm: "an object" };
  } catch {
    const entries = Object.entries(sampling.logit_bias).map(([key, value]) => ({ key: Number(key), value }));
    const parameters = { ...shared.TEXT_REQUEST.parameters, sampling: { ...sampling, logit_bias: entries } };
    return { request: { parameters }, mapForm: "a list of entries" };
  }
}

function count(messages, event) {
  return messages.filter((message) => message.event === event).length;
}

const checks = {
  async "health Watch"({ health }) {
    // Also waits for a server that has just started.
    const call = health.Watch({ service: "" }, callOptions());
    const { messages, error } = await readStream(call, ({ status }) => status === "SERVING" && call.cancel());
    assert.equal(error?.code, grpc.status.CANCELLED, `ended with ${error}`);
    assert.equal(messages.at(-1)?.status, "SERVING");
    return `${messages.map(({ status }) => status).join(", ")}, then CANCELLED`;
  },

  async "health Check"({ health }) {
    for (const service of ["", shared.GENERATION_SERVICE, shared.MODEL_SERVICE]) {
      assert.equal((await answer(health, "Check", { service })).status, "SERVING");
    }
    assert.equal((await failure(health, "Check", { service: "nothing" })).code, grpc.status.NOT_FOUND);
    return "SERVING, NOT_FOUND for an unknown service";
  },

  async "GetModel"({ model }) {
    const facts = await answer(model, "GetModel", {});
    assert.equal(facts.slot_count, 1, "the server must have one slot");
    assert.ok(facts.modes.includes("MODE_FULL_DEPTH") && facts.actions.includes("ACTION_FULL"), JSON.stringify(facts));
    return `${facts.architecture}, ${facts.layer_count} layers, ${facts.default_mode}`;
  },

  async "Generate"({ generation, definitions }) {
    const { request, mapForm } = textRequest(definitions);
    const { started, output, finished } = await answer(generation, "Generate", request);
    assert.equal(started.seed, shared.LARGEST_SEED);
    assert.equal(started.mode, "MODE_FULL_DEPTH");
    assert.equal(output.text, shared.TEXT);
    assert.equal(output.logprobs.length, shared.NUM_TEXT_TOKENS);
    assert.equal(output.logprobs[0].top.length, 2);
    const actions = Array(shared.NUM_TEXT_TOKENS * started.layer_count).fill(shared.ACTION_FULL);
    assert.deepEqual([...output.actions], actions);
    assert.equal(finished.reason, "FINISH_REASON_LENGTH");
    assert.equal(finished.usage.output_token_count, shared.NUM_TEXT_TOKENS);
    return `"${output.text}", seed ${started.seed}, ${actions.length} actions, a map is ${mapForm}`;
  },

  async "StreamGenerate"({ generation }) {
    const { messages, error } = await readStream(generation.StreamGenerate(shared.SHORT_REQUEST, callOptions()));
    assert.equal(error, null);
    assert.equal(messages.at(0)?.event, "started");
    assert.equal(messages.at(-1).event, "finished");
    const deltas = messages.slice(1, -1);
    assert.ok(deltas.length > 1 && deltas.every(({ event }) => event === "delta"), `${deltas.length} deltas`);
    assert.equal(deltas.map(({ delta }) => delta.text).join(""), "abcabc");
    return `started, ${deltas.length} deltas, finished`;
  },

  async "StreamGenerate cancelled"({ generation }) {
    const call = generation.StreamGenerate(shared.LONG_REQUEST, callOptions());
    let numDeltas = 0;
    const { messages, error } = await readStream(call, ({ event }) => {
      numDeltas += event === "delta";
      if (numDeltas === 3) call.cancel();
    });
    assert.equal(error?.code, grpc.status.CANCELLED, `ended with ${error}`);
    assert.equal(count(messages, "finished"), 0);
    await answer(generation, "Generate", shared.ONE_TOKEN_REQUEST, shared.SLOT_SECONDS);
    return `${numDeltas} deltas, CANCELLED, the slot is free`;
  },

  async "StreamGenerate deadline"({ generation }) {
    const { messages, error } = await readStream(generation.StreamGenerate(shared.LONG_REQUEST, callOptions(1)));
    assert.equal(error?.code, grpc.status.DEADLINE_EXCEEDED, `ended with ${error}`);
    assert.ok(count(messages, "delta") > 0, "no delta came before the deadline");
    await answer(generation, "Generate", shared.ONE_TOKEN_REQUEST, shared.SLOT_SECONDS);
    return `${count(messages, "delta")} deltas, DEADLINE_EXCEEDED, the slot is free`;
  },

  async "error details"({ generation }) {
    const unary = await failure(generation, "Generate", shared.WRONG_REQUEST);
    const stream = await readStream(generation.StreamGenerate(shared.WRONG_REQUEST, callOptions()));
    for (const error of [unary, stream.error]) {
      assert.equal(error?.code, grpc.status.INVALID_ARGUMENT, `ended with ${error}`);
      shared.checkErrorDetails(errorDetails(error));
    }
    return "INVALID_ARGUMENT, BadRequest with 2 fields, ErrorInfo; unary and stream";
  },
};

const { target, protoFolder } = shared.start("grpc-js", 120);
const ways = {
  "grpc-js, proto files": definitionsFromProtoFiles,
  "grpc-js, reflection": definitionsFromReflection,
};
for (const [client, load] of Object.entries(ways)) {
  let definitions;
  await shared.runCheck(client, "schema", async () => {
    definitions = await load(target, protoFolder);
    return `${shared.SERVICES.filter((service) => definitions[service]).length} services`;
  });
  const connect = (service) =>
    new (grpc.makeClientConstructor(definitions[service], service))(target, grpc.credentials.createInsecure());
  const [generation, model, health] = shared.SERVICES.map(connect);
  for (const [name, check] of Object.entries(checks)) {
    await shared.runCheck(client, name, () => check({ generation, model, health, definitions }));
  }
  [generation, model, health].forEach((each) => each.close());
}
