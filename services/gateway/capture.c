// Does in Envoy's own code what capture.lua does, at a part of its cost; see there for the rules. Both write dynamic
// metadata for one log, one reader and the same settings. Here everything is in the key `qh`, since each key costs:
// headers and body of the request, headers and body of the response, each in base64, between bars. Built by
// `hatch_build.py` where there is a C compiler; where there is none, Envoy runs the script.
//
// Source: Envoy 1.40, source/extensions/dynamic_modules/abi/abi.h (ABI v0.2.0): an HTTP filter is these functions.
// Envoy looks up every hook when it loads the module, so all of them are here, most of them empty.

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

// ---------------------------------------------------------------------------- What Envoy offers

typedef struct { const char *ptr; size_t length; } Text;  // Envoy's `envoy_buffer` and `module_buffer`.
typedef struct { const char *key; size_t key_length; const char *value; size_t value_length; } Header;

enum { REQUEST_HEADERS = 0, RESPONSE_HEADERS = 2 };        // http_header_type
enum { RECEIVED_REQUEST_BODY = 0, RECEIVED_RESPONSE_BODY = 2 };  // http_body_type
enum { ROUTE = 1 };                                        // metadata_source
enum { CONTINUE = 0 };                                     // every status

bool envoy_dynamic_module_callback_http_get_header(void *envoy, int kind, Text key, Text *value, size_t index, size_t *count);
size_t envoy_dynamic_module_callback_http_get_headers_size(void *envoy, int kind);
bool envoy_dynamic_module_callback_http_get_headers(void *envoy, int kind, Header *headers);
bool envoy_dynamic_module_callback_http_set_header(void *envoy, int kind, Text key, Text value);
size_t envoy_dynamic_module_callback_http_get_body_chunks_size(void *envoy, int kind);
bool envoy_dynamic_module_callback_http_get_body_chunks(void *envoy, int kind, Text *chunks);
bool envoy_dynamic_module_callback_http_get_metadata_number(void *envoy, int source, Text ns, Text key, double *value);
bool envoy_dynamic_module_callback_http_get_metadata_string(void *envoy, int source, Text ns, Text key, Text *value);
void envoy_dynamic_module_callback_http_set_dynamic_metadata_string(void *envoy, Text ns, Text key, Text value);

// ---------------------------------------------------------------------------- Bytes

#define TEXT(literal) ((Text){literal, sizeof(literal) - 1})
static const Text SETTINGS = TEXT("ekiben.capture");  // The filter's name: `routes.CAPTURE`.
static const Text KEPT = TEXT("cap");
static const Text REDACTED = TEXT("[redacted]");

typedef struct { char *bytes; size_t length, room; } Bytes;

// Appends; on a machine without memory nothing, which leaves the capture short and the request alone.
static bool append(Bytes *to, const char *bytes, size_t length) {
  if (to->length + length > to->room) {
    size_t room = to->room ? to->room : 1024;
    while (room < to->length + length) room *= 2;
    char *grown = realloc(to->bytes, room);
    if (!grown) return false;
    to->bytes = grown;
    to->room = room;
  }
  if (length) memcpy(to->bytes + to->length, bytes, length);
  to->length += length;
  return true;
}

static const char ALPHABET[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
static char PAIRS[4096][2];  // Of 12 bits: half the steps that the alphabet would take.

static void make_pairs(void) {
  for (int i = 0; i < 4096; i++) {
    PAIRS[i][0] = ALPHABET[i >> 6];
    PAIRS[i][1] = ALPHABET[i & 63];
  }
}

static size_t base64_length(const Bytes *raw) { return (raw->length + 2) / 3 * 4; }

// Writes the base64 of `raw`, and gives where it ends.
static char *base64(const Bytes *raw, char *out) {
  const unsigned char *in = (const unsigned char *)raw->bytes;
  for (size_t left = raw->length / 3; left; left--, in += 3, out += 4) {
    uint32_t three = (uint32_t)in[0] << 16 | (uint32_t)in[1] << 8 | in[2];
    memcpy(out, PAIRS[three >> 12], 2);
    memcpy(out + 2, PAIRS[three & 4095], 2);
  }
  size_t rest = raw->length % 3;
  if (rest) {
    uint32_t last = (uint32_t)in[0] << 16 | (rest == 2 ? (uint32_t)in[1] << 8 : 0);
    memcpy(out, PAIRS[last >> 12], 2);
    out[2] = rest == 2 ? ALPHABET[last >> 6 & 63] : '=';
    out[3] = '=';
    out += 4;
  }
  return out;
}

static bool same(Text one, const char *other) { return strlen(other) == one.length && !memcmp(one.ptr, other, one.length); }

static bool among(Text name, const char *const *names) {
  for (; *names; names++)
    if (same(name, *names)) return true;
  return false;
}

// ---------------------------------------------------------------------------- Rules, as of capture.lua

static const char *const SECRET[] = {"authorization", "cookie", "set-cookie", "proxy-authorization", "x-yatai-api-token", "x-api-key", NULL};
static const char *const LEFT_OUT[] = {":authority", ":method", ":path", ":scheme", ":status", ":protocol", "x-request-id",
                                       "x-forwarded-for", "x-forwarded-proto", "x-envoy-external-address", NULL};

static bool alphanumeric(char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

// Whether a token of the platform is in there, whatever the scheme before it: `ekb_` or `eks_` where a word begins.
static bool holds_token(Text value) {
  for (size_t i = 0; i + 4 <= value.length; i++) {
    const char *at = value.ptr + i;
    if (at[0] == 'e' && at[1] == 'k' && (at[2] == 'b' || at[2] == 's') && at[3] == '_' && (i == 0 || !alphanumeric(at[-1]))) return true;
  }
  return false;
}

// `names` are between line ends: "\nx-one\nx-two\n".
static bool redacted_too(Text names, Text name) {
  for (size_t i = 0; i + name.length + 2 <= names.length; i++)
    if (names.ptr[i] == '\n' && names.ptr[i + 1 + name.length] == '\n' && !memcmp(names.ptr + i + 1, name.ptr, name.length)) return true;
  return false;
}

static double random_percent(void) {  // xorshift64*, for each of Envoy's workers; nothing secret hangs on it.
  static _Thread_local uint64_t state;
  if (!state) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    state = ((uint64_t)now.tv_nsec << 32) ^ (uint64_t)now.tv_sec ^ (uint64_t)(uintptr_t)&state ^ 0x9E3779B97F4A7C15u;
  }
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return (double)((state * 0x2545F4914F6CDD1Du) >> 11) / 9007199254740992.0 * 100.0;
}

// ---------------------------------------------------------------------------- One request

typedef struct {
  bool on;
  size_t most;  // Of each body.
  Bytes redacted, request_headers, request_body, response_headers, response_body;
} Capture;

static void keep_headers(void *envoy, int kind, const Capture *capture, Bytes *to) {
  size_t count = envoy_dynamic_module_callback_http_get_headers_size(envoy, kind);
  Header *headers = malloc((count + 1) * sizeof(Header));
  if (!headers) return;
  if (envoy_dynamic_module_callback_http_get_headers(envoy, kind, headers)) {
    to->length = 0;  // After a retry of the whole the last answer counts.
    for (size_t i = 0; i < count; i++) {
      Text name = {headers[i].key, headers[i].key_length}, value = {headers[i].value, headers[i].value_length};
      if (among(name, LEFT_OUT)) continue;
      if (among(name, SECRET) || redacted_too((Text){capture->redacted.bytes, capture->redacted.length}, name)) value = REDACTED;
      if (to->length) append(to, "\n", 1);
      append(to, name.ptr, name.length);
      append(to, ":", 1);
      append(to, value.ptr, value.length);
    }
  }
  free(headers);
}

static void keep_body(void *envoy, int kind, size_t most, Bytes *to) {
  if (to->length >= most) return;
  size_t count = envoy_dynamic_module_callback_http_get_body_chunks_size(envoy, kind);
  Text few[16], *chunks = count <= 16 ? few : malloc(count * sizeof(Text));
  if (!chunks) return;
  if (count && envoy_dynamic_module_callback_http_get_body_chunks(envoy, kind, chunks))
    for (size_t i = 0; i < count && to->length < most; i++)
      append(to, chunks[i].ptr, chunks[i].length < most - to->length ? chunks[i].length : most - to->length);
  if (chunks != few) free(chunks);
}

const char *envoy_dynamic_module_on_program_init(void) {
  make_pairs();
  return "v0.2.0";
}

void *envoy_dynamic_module_on_http_filter_config_new(void *config, Text name, Text settings) {
  static char any;
  return &any;
}

void *envoy_dynamic_module_on_http_filter_new(void *config, void *envoy) { return calloc(1, sizeof(Capture)); }

int envoy_dynamic_module_on_http_filter_request_headers(void *envoy, void *module, bool end) {
  Capture *capture = module;
  Text value, name = TEXT("authorization");
  size_t count = 0;
  bool ours = false;
  for (size_t i = 0; envoy_dynamic_module_callback_http_get_header(envoy, REQUEST_HEADERS, name, &value, i, &count) && i < count; i++)
    ours = ours || holds_token(value);
  if (ours) envoy_dynamic_module_callback_http_set_header(envoy, REQUEST_HEADERS, name, (Text){NULL, 0});
  double most, percent;
  if (!envoy_dynamic_module_callback_http_get_metadata_number(envoy, ROUTE, SETTINGS, TEXT("max"), &most) ||
      !envoy_dynamic_module_callback_http_get_metadata_number(envoy, ROUTE, SETTINGS, TEXT("percent"), &percent))
    return CONTINUE;
  if (percent < 100 && random_percent() >= percent) return CONTINUE;
  capture->on = true;
  capture->most = most > 0 ? (size_t)most : 0;
  Text redacted;
  if (envoy_dynamic_module_callback_http_get_metadata_string(envoy, ROUTE, SETTINGS, TEXT("redacted"), &redacted))
    append(&capture->redacted, redacted.ptr, redacted.length);
  keep_headers(envoy, REQUEST_HEADERS, capture, &capture->request_headers);
  return CONTINUE;
}

int envoy_dynamic_module_on_http_filter_request_body(void *envoy, void *module, bool end) {
  Capture *capture = module;
  if (capture->on) keep_body(envoy, RECEIVED_REQUEST_BODY, capture->most, &capture->request_body);
  return CONTINUE;
}

int envoy_dynamic_module_on_http_filter_response_headers(void *envoy, void *module, bool end) {
  Capture *capture = module;
  if (capture->on) keep_headers(envoy, RESPONSE_HEADERS, capture, &capture->response_headers);
  return CONTINUE;
}

int envoy_dynamic_module_on_http_filter_response_body(void *envoy, void *module, bool end) {
  Capture *capture = module;
  if (capture->on) keep_body(envoy, RECEIVED_RESPONSE_BODY, capture->most, &capture->response_body);
  return CONTINUE;
}

// Envoy calls it before it writes the log, for a stream that broke, too.
void envoy_dynamic_module_on_http_filter_stream_complete(void *envoy, void *module) {
  Capture *capture = module;
  if (!capture->on) return;
  const Bytes *parts[] = {&capture->request_headers, &capture->request_body, &capture->response_headers, &capture->response_body};
  size_t room = 3;
  for (int i = 0; i < 4; i++) room += base64_length(parts[i]);
  char *text = malloc(room), *end = text;
  if (!text) return;
  for (int i = 0; i < 4; i++) {
    if (i) *end++ = '|';
    end = base64(parts[i], end);
  }
  envoy_dynamic_module_callback_http_set_dynamic_metadata_string(envoy, KEPT, TEXT("qh"), (Text){text, (size_t)(end - text)});
  free(text);
}

void envoy_dynamic_module_on_http_filter_destroy(void *module) {
  Capture *capture = module;
  free(capture->redacted.bytes);
  free(capture->request_headers.bytes);
  free(capture->request_body.bytes);
  free(capture->response_headers.bytes);
  free(capture->response_body.bytes);
  free(capture);
}

// ---------------------------------------------------------------------------- Hooks that are not needed

void *envoy_dynamic_module_on_http_filter_per_route_config_new(Text name, Text settings) {
  static char any;
  return &any;
}
int envoy_dynamic_module_on_http_filter_request_trailers(void *envoy, void *module) { return CONTINUE; }
int envoy_dynamic_module_on_http_filter_response_trailers(void *envoy, void *module) { return CONTINUE; }
int envoy_dynamic_module_on_http_filter_local_reply(void *envoy, void *module, uint32_t status, Text details, bool reset) { return CONTINUE; }

#define NOTHING(hook) void envoy_dynamic_module_on_http_filter_##hook(void) {}  // Never called; looked up by name.
NOTHING(config_destroy)
NOTHING(per_route_config_destroy)
NOTHING(config_http_callout_done)
NOTHING(config_http_stream_complete)
NOTHING(config_http_stream_data)
NOTHING(config_http_stream_headers)
NOTHING(config_http_stream_reset)
NOTHING(config_http_stream_trailers)
NOTHING(config_scheduled)
NOTHING(downstream_above_write_buffer_high_watermark)
NOTHING(downstream_below_write_buffer_low_watermark)
NOTHING(http_callout_done)
NOTHING(http_stream_complete)
NOTHING(http_stream_data)
NOTHING(http_stream_headers)
NOTHING(http_stream_reset)
NOTHING(http_stream_trailers)
NOTHING(scheduled)
