-- Runs in Envoy for each request to a deployment: takes the platform's tokens out of it, and keeps what the capture
-- log writes: headers, and bodies up to a limit, as they pass. Nothing is held back: streams stay streams.
--
-- The route's metadata says how: `percent` of requests, `max` bytes of each body, `redacted` header names between line
-- ends. Without it nothing is kept. What is kept goes into dynamic metadata piece by piece, so that a stream which
-- breaks keeps what it had:
--   qh, sh          headers of the request and the response: `name:value` lines
--   q0, q1, … s0, … bodies; a key holds pieces divided by commas. Those from q1 and s1 on are apart (`cap.more`): a
--                   whole structure is slow to write as JSON, four texts are not
-- The presence of `qh` makes Envoy write the line. All is in base64: bytes that are not UTF-8 would become empty
-- strings, and text that needs escapes in JSON is slow to write. This script is most of what a capture costs.

-- Nearly every line calls into Envoy, which no trace can hold: compiling is given up again and again (13 % of the cost).
jit.off()

local SEGMENT = 16384 -- Adding to a key copies what it has; so a key gets no longer than this plus one piece.
-- true: the value is a secret; false: left out, since the line has it in a field of its own or Envoy made it.
local RULES = {
  ["authorization"] = true, ["cookie"] = true, ["set-cookie"] = true, ["proxy-authorization"] = true,
  ["x-yatai-api-token"] = true, ["x-api-key"] = true,
  [":authority"] = false, [":method"] = false, [":path"] = false, [":scheme"] = false, [":status"] = false,
  [":protocol"] = false, ["x-request-id"] = false, ["x-forwarded-for"] = false, ["x-forwarded-proto"] = false,
  ["x-envoy-external-address"] = false,
}
local find, concat, random = string.find, table.concat, math.random

local function put(h, namespace, key, value)
  -- Fetched anew each time: the object does not outlive a body chunk.
  h:streamInfo():dynamicMetadata():set(namespace, key, value)
end

local function keep_headers(h, headers, key, redacted)
  local lines, n = {}, 0
  for name, value in pairs(headers) do
    local rule = RULES[name]
    if rule ~= false then
      if rule or (redacted and find(redacted, "\n" .. name .. "\n", 1, true)) then value = "[redacted]" end
      n = n + 1
      lines[n] = name .. ":" .. value
    end
  end
  put(h, "cap", key, h:base64Escape(concat(lines, "\n")))
end

local function keep_body(h, key, max)
  local kept, number, segment = 0, 0, ""
  for chunk in h:bodyChunks() do
    local length = chunk:length()
    if length > 0 then
      local take = length
      if kept + take > max then take = max - kept end
      kept = kept + take
      if #segment >= SEGMENT then number, segment = number + 1, "" end
      local piece = h:base64Escape(chunk:getBytes(0, take))
      segment = segment == "" and piece or segment .. "," .. piece
      put(h, number == 0 and "cap" or "cap.more", key .. number, segment)
      if kept >= max then return end
    end
  end
end

function envoy_on_request(h)
  local headers = h:headers()
  local authorization = headers:get("authorization")
  if authorization and find(authorization, "%f[%w]ek[bs]_") then -- Whatever the scheme, or without one.
    headers:remove("authorization")
  end
  local settings = h:metadata()
  local max = settings:get("max")
  if not max then return end
  local percent = settings:get("percent")
  if percent < 100 then
    if random() * 100 >= percent then return end
    put(h, "cap.on", "max", max)
  end
  keep_headers(h, headers, "qh", settings:get("redacted"))
  if max > 0 then keep_body(h, "q", max) end
end

function envoy_on_response(h)
  local settings = h:metadata()
  local max = settings:get("max")
  if not max then return end
  if settings:get("percent") < 100 and not h:streamInfo():dynamicMetadata():get("cap.on") then return end
  keep_headers(h, h:headers(), "sh", settings:get("redacted"))
  if max > 0 then keep_body(h, "s", max) end
end
