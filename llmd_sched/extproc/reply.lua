-- Lean path: note when a reply's first and last body chunk came from the model server, count its events and keep its
-- tail, as dynamic metadata for the access log. Each key is set as soon as it is known: when the client goes away this
-- coroutine is simply dropped, and its entry still says when the first token came.
local function note(handle, key, value)
  -- Envoy invalidates the metadata object at every yield, so it is fetched anew.
  handle:streamInfo():dynamicMetadata():set("llmd", key, value)
end

function envoy_on_response(handle)
  local ours = handle:streamInfo():dynamicMetadata():get("llmd")
  if ours == nil then
    return
  end
  for name, value in pairs(ours["reply_headers"] or {}) do
    handle:headers():replace(name, value)
  end
  local content_type = handle:headers():get("content-type") or ""
  local streamed = string.find(content_type, "text/event-stream", 1, true) ~= nil
  note(handle, "streamed", streamed)
  local events, tail, cut, last_us = 0, "", "\n", nil
  for chunk in handle:bodyChunks() do
    local length = chunk:length()
    if length > 0 then
      last_us = tonumber(handle:timestampString(EnvoyTimestampResolution.MICROSECOND))
      if tail == "" then
        note(handle, "first_us", last_us)
      end
      local text = chunk:getBytes(0, length)
      if streamed then
        -- With the line break before it, and the end of the last chunk, in which a mark may have begun.
        local lines = cut .. text
        local _, at = string.find(lines, "\ndata: ", 1, true)
        while at do
          events = events + 1
          _, at = string.find(lines, "\ndata: ", at, true)
        end
        cut = string.sub(lines, -6)
      end
      if length >= TAIL_BYTES then
        tail = string.sub(text, -TAIL_BYTES)
      else
        tail = string.sub(tail .. text, -TAIL_BYTES)
      end
    end
  end
  if last_us then
    note(handle, "last_us", last_us)
    note(handle, "events", events)
    -- Metadata is a protobuf string: a byte that is not UTF-8 would spoil the whole entry.
    note(handle, "tail", (string.gsub(tail, "[\128-\255]", "?")))
  end
end
