// The four shapes of the service, health and an error, by grpc-js against a real `forkring serve`.
'use strict';

const assert = require('node:assert/strict');
const { spawn } = require('node:child_process');
const { createHash } = require('node:crypto');
const { once } = require('node:events');
const { readdirSync } = require('node:fs');
const path = require('node:path');
const readline = require('node:readline');
const { after, before, test } = require('node:test');

const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const ROOT = path.resolve(__dirname, '../../..');
const BINARY = process.env.FORKRING_BIN || path.join(ROOT, 'target/debug/forkring');
const NAME = `clients-node-${process.pid}`;
const LARGE = 8 << 20;

const load = (file, folder) =>
  grpc.loadPackageDefinition(
    loader.loadSync(file, { includeDirs: [folder], longs: Number, enums: String, defaults: true }),
  );
const { Dispatcher } = load('forkring/v1/dispatcher.proto', path.join(ROOT, 'proto')).forkring.v1;
const { Health } = load('health.proto', __dirname).grpc.health.v1;

let server;
let address;
let stderr = '';
const clients = [];

// Generous, so that only a server that does not answer fails by it.
const patience = () => ({ deadline: Date.now() + 60_000 });

function connect(Service) {
  const anySize = { 'grpc.max_receive_message_length': -1, 'grpc.max_send_message_length': -1 };
  const client = new Service(address, grpc.credentials.createInsecure(), anySize);
  clients.push(client);
  return client;
}

// A unary call, or one whose requests are a stream, as a promise. The stream is handed to `send`.
function answer(client, method, request, send = () => {}) {
  return new Promise((resolve, reject) => {
    const done = (error, response) => (error ? reject(error) : resolve(response));
    send(request ? client[method](request, patience(), done) : client[method](patience(), done));
  });
}

// All that a stream brings; it must end with OK.
async function collect(stream) {
  const results = [];
  const status = once(stream, 'status');
  for await (const result of stream) results.push(result);
  assert.equal((await status)[0].code, grpc.status.OK);
  return results;
}

const items = (count, fields) =>
  Array.from({ length: count }, (_, id) => ({ pool: 'echo', id, payload: Buffer.from(`item ${id}`), ...fields }));

// Each item has come back once, in whatever order.
function assertEchoes(results, count) {
  const wrong = results.filter(({ id, payload, status }) => status || String(payload) !== `item ${id}`);
  assert.deepEqual(wrong, []);
  assert.deepEqual([results.length, new Set(results.map(({ id }) => id)).size], [count, count]);
}

before(async () => {
  const settings = Object.entries(process.env).filter(([key]) => !key.startsWith('FORKRING_'));
  // The kernel ends it if this process dies.
  const own = ['--name', NAME, '--listen', '127.0.0.1:0', '--parent', process.pid];
  server = spawn(BINARY, ['serve', ...own, '--pool=echo:2=echo', '--pool=hash:1=sha256'], {
    stdio: ['ignore', 'pipe', 'pipe'],
    env: { ...Object.fromEntries(settings), FORKRING_LOG: 'warn' },
  });
  server.stderr.on('data', (data) => (stderr += data));
  const [line] = await once(readline.createInterface({ input: server.stdout }), 'line');
  address = line.match(/^listening on (.+)$/)[1];
});

after(async () => {
  clients.forEach((client) => client.close());
  const exit = once(server, 'close');
  server.kill('SIGTERM');
  assert.deepEqual([...(await exit), stderr], [0, null, ''], 'a drain ends with 0, and nothing went wrong before');
  assert.deepEqual(readdirSync('/dev/shm').filter((name) => name.includes(NAME)), []);
});

test('Call', async () => {
  const client = connect(Dispatcher);
  const item = { pool: 'echo', id: 7, payload: Buffer.from('hello'), metadata: { a: 'b' } };
  const result = await answer(client, 'call', item);
  assert.deepEqual([result.id, String(result.payload), result.attempts], [7, 'hello', 1]);
  assert.equal(result.status, null);
  const hashed = await answer(client, 'call', { pool: 'hash', payload: Buffer.from('abc') });
  assert.deepEqual(hashed.payload, createHash('sha256').update('abc').digest());
});

test('Call with 8 MiB both ways', async () => {
  const payload = Buffer.alloc(LARGE, 'all work and no play');
  const result = await answer(connect(Dispatcher), 'call', { pool: 'echo', payload });
  assert.ok(payload.equals(result.payload));
});

test('Submit, and GetUpdates', async () => {
  const client = connect(Dispatcher);
  const updates = client.getUpdates({ subscription: 'node', limit: 1000 }, patience());
  const receipt = await answer(client, 'submit', null, (stream) => {
    for (const item of items(1000, { subscription: 'node' })) stream.write(item);
    stream.write({ pool: 'nope', id: 4711 });
    stream.end();
  });
  assert.deepEqual([receipt.accepted, receipt.rejected], [1000, 1]);
  assert.deepEqual([receipt.rejections[0].id, receipt.rejections[0].status.reason], [4711, 'UNKNOWN_POOL']);
  assertEchoes(await collect(updates), 1000);
});

test('Process, pipelined', async () => {
  const stream = connect(Dispatcher).process(patience());
  for (const item of items(1000)) stream.write(item);
  stream.end();
  assertEchoes(await collect(stream), 1000);
});

test('Process, one item at a time, and a failed item', async () => {
  const stream = connect(Dispatcher).process(patience());
  const ended = once(stream, 'status');
  const results = stream[Symbol.asyncIterator]();
  for (const item of items(50)) {
    stream.write(item);
    assertEchoes([(await results.next()).value], 1);
  }
  stream.write({ pool: 'nope', id: 50 });
  const { status } = (await results.next()).value;
  assert.deepEqual([status.code, status.reason], [grpc.status.NOT_FOUND, 'UNKNOWN_POOL']);
  stream.end();
  assert.ok((await results.next()).done);
  assert.equal((await ended)[0].code, grpc.status.OK);
});

test('a failed call has a code and a message', async () => {
  const failed = await answer(connect(Dispatcher), 'call', { pool: 'nöpe' }).catch((error) => error);
  assert.equal(failed.code, grpc.status.NOT_FOUND);
  assert.equal(failed.details, 'there is no pool `nöpe`: this server has echo, hash');
  // google.rpc.Status with its google.rpc.ErrorInfo.
  const [details] = failed.metadata.get('grpc-status-details-bin');
  assert.ok(details.includes('UNKNOWN_POOL'));
});

test('a compressed request is refused', async () => {
  const gzip = { 'grpc.default_compression_algorithm': 2 };
  const client = new Dispatcher(address, grpc.credentials.createInsecure(), gzip);
  clients.push(client);
  const failed = await answer(client, 'call', { pool: 'echo', payload: Buffer.alloc(1000) }).catch((error) => error);
  assert.equal(failed.code, grpc.status.UNIMPLEMENTED);
});

test('health of the server and of each pool', async () => {
  const client = connect(Health);
  for (const service of ['', 'echo', 'hash', 'forkring.v1.Dispatcher']) {
    assert.equal((await answer(client, 'check', { service })).status, 'SERVING');
  }
  const failed = await answer(client, 'check', { service: 'nope' }).catch((error) => error);
  assert.equal(failed.code, grpc.status.NOT_FOUND);
});
