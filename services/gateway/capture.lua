-- Runs in Envoy for each request to a deployment: takes the platform's tokens out of it, and keeps what the capture
-- log writes: headers, and bodies up to a limit, as they pass. Nothing is held back: streams stay streams.
--
-- The route's metadata says how: `percent` of requests, `max` bytes of each body, `redacted` header names between line
-- ends. Without it nothing is kept. What is kept is base64 of each piece, since bytes that are not UTF-8 would become
-- empty strings, and is put away piece by piece, so that a stream which breaks keeps what it had:
--   qh, sh          headers of the request and the response, `name: value` lines
--   q0, q1, … s0, … bodies; a key holds pieces divided by commas
-- The filter state `cap.on` holds the limit, and its presence makes Envoy write the line.

local SEGMENT = 16384 -- Adding to a key copies what it has; so a key gets no longer than this plus one piece.
local ALWAYS = {
  ["authorization"] = true, ["cookie"] = true, ["set-cookie"] = true, ["proxy-authorization"] = true,
  ["x-yatai-api-token"] = true, ["x-api-key"] = true,
}

local function put(h, namespace, key, value)
  -- Fetched anew each time: the object does not outlive a body chunk.
  h:streamInfo():dynamicMetadata():set(namespace, key, value)
end

local function keep_headers(h, key, redacted)
  local lines, n = {}, 0
  for name, value in pairs(h:headers()) do
    if ALWAYS[name] or (redacted and string.find(redacted, "\n" .. name .. "\n", 1, true)) then
      value = "[redacted]"
    end
    n = n + 1
    lines[n] = name .. ": " .. value
  end
  put(h, "cap", key, h:base64Escape(table.concat(lines, "\n")))
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
      put(h, "cap", key .. number, segment)
      if kept >= max then return end
    end
  end
end

function envoy_on_request(h)
  local headers = h:headers()
  local authorization = headers:get("authorization")
  if authorization and string.find(authorization, "[Bb][Ee][Aa][Rr][Ee][Rr]%s+ek[bs]_") then
    headers:remove("authorization")
  end
  local settings = h:metadata()
  local max = settings:get("max")
  if max and math.random() * 100 < settings:get("percent") then
    put(h, "cap.on", "max", max)
    keep_headers(h, "qh", settings:get("redacted"))
    if max > 0 then keep_body(h, "q", max) end
  end
end

function envoy_on_response(h)
  local on = h:streamInfo():dynamicMetadata():get("cap.on")
  if on then
    keep_headers(h, "sh", h:metadata():get("redacted"))
    if on.max > 0 then keep_body(h, "s", on.max) end
  end
end
