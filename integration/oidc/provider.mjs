// An OpenID provider for tests: `node provider.mjs PORT AUDIENCE`.
// It prints "ready" and listens on 127.0.0.1. GET /test/rotate makes new signing keys (the old ones
// stay valid for what they signed only if ?keep=1), GET /test/lifetime?access=N sets how long new
// access tokens live, GET /test/offset?s=N moves this provider's clock.
import { generateKeyPairSync, randomUUID } from 'node:crypto';
import { createServer } from 'node:http';
import { Provider } from 'oidc-provider';

const port = Number(process.argv[2]);
const audience = process.argv[3];
const issuer = `http://127.0.0.1:${port}`;
let lifetime = 600;

const realNow = Date.now.bind(Date);
let offset = 0;
Date.now = () => realNow() + offset;

function makeKey() {
  const { privateKey } = generateKeyPairSync('rsa', { modulusLength: 2048 });
  return { ...privateKey.export({ format: 'jwk' }), kid: randomUUID(), use: 'sig', alg: 'RS256' };
}

// tokens and sessions outlive a change of keys
const shared = new Map();
class Adapter {
  constructor(name) { this.name = name; }
  key(id) { return `${this.name}:${id}`; }
  async upsert(id, payload) { shared.set(this.key(id), payload); }
  async find(id) { return shared.get(this.key(id)); }
  async #by(field, value) {
    for (const [key, payload] of shared) {
      if (key.startsWith(`${this.name}:`) && payload[field] === value) return payload;
    }
    return undefined;
  }
  async findByUserCode(code) { return this.#by('userCode', code); }
  async findByUid(uid) { return this.#by('uid', uid); }
  async consume(id) { shared.get(this.key(id)).consumed = Math.floor(Date.now() / 1000); }
  async destroy(id) { shared.delete(this.key(id)); }
  async revokeByGrantId(grantId) {
    for (const [key, payload] of shared) if (payload.grantId === grantId) shared.delete(key);
  }
}

function makeProvider(keys) {
  const native = { token_endpoint_auth_method: 'none', application_type: 'native' };
  const provider = new Provider(issuer, {
    adapter: Adapter,
    clients: [
      {
        ...native,
        client_id: 'device',
        redirect_uris: [],
        response_types: [],
        grant_types: ['urn:ietf:params:oauth:grant-type:device_code', 'refresh_token'],
      },
      {
        ...native,
        client_id: 'browser',
        redirect_uris: ['http://127.0.0.1/callback'],
        response_types: ['code'],
        grant_types: ['authorization_code', 'refresh_token'],
      },
    ],
    jwks: { keys },
    cookies: { keys: ['for tests only'] },
    pkce: { required: () => true },
    scopes: ['openid', 'offline_access', 'profile'],
    claims: { openid: ['sub'], profile: ['groups'] },
    ttl: { AccessToken: () => lifetime, IdToken: 600, RefreshToken: 86400, Grant: 86400, Session: 86400, Interaction: 600, DeviceCode: 60 },
    features: {
      deviceFlow: { enabled: true },
      revocation: { enabled: true },
      resourceIndicators: {
        enabled: true,
        defaultResource: () => audience,
        useGrantedResource: () => true,
        getResourceServerInfo: () => ({
          scope: 'profile',
          audience,
          accessTokenTTL: lifetime,
          accessTokenFormat: 'jwt',
          jwt: { sign: { alg: 'RS256' } },
        }),
      },
    },
    async extraTokenClaims() { return { groups: ['ops', 'staff'], team: 'net' }; },
    async findAccount(_, id) {
      return { accountId: id, claims: async () => ({ sub: id, groups: ['ops', 'staff'] }) };
    },
  });
  return provider.callback();
}

let keys = [makeKey()];
let answer = makeProvider(keys);

createServer((request, response) => {
  const url = new URL(request.url, issuer);
  if (!url.pathname.startsWith('/test/')) {
    answer(request, response);
    return;
  }
  if (url.pathname === '/test/rotate') {
    keys = url.searchParams.get('keep') ? [makeKey(), ...keys] : [makeKey()];
    answer = makeProvider(keys);
  } else if (url.pathname === '/test/lifetime') {
    lifetime = Number(url.searchParams.get('access'));
  } else if (url.pathname === '/test/offset') {
    offset = Number(url.searchParams.get('s')) * 1000;
  }
  response.end('ok\n');
}).listen(port, '127.0.0.1', () => console.log('ready'));
