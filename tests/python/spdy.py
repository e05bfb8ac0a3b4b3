"""SPDY/3 as `kubectl port-forward` speaks it over an upgraded connection: streams that are opened by the client, in two pairs of hands."""

import struct
import threading
import zlib

# What headers' compression begins with; the specification gives it.
_WORDS = """options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age allow authorization
cache-control connection content-base content-encoding content-language content-length content-location content-md5 content-range content-type
date etag expect expires from host if-match if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards
pragma proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade user-agent vary via warning
www-authenticate method get status 200_OK version HTTP/1.1 url public set-cookie keep-alive origin"""
_REST = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505203 Non-Authoritative Information204 No Content"
    "301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service "
    "UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,"
    "image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8"
    "charset=iso-8859-1,utf-,*,enq=0."
)
DICTIONARY = b"".join(struct.pack(">I", len(word)) + word.replace("_", " ").encode() for word in _WORDS.split()) + _REST.encode()
assert zlib.adler32(DICTIONARY) == 0xE3C6A7C2

SYN_STREAM, SYN_REPLY, RST_STREAM, PING, GOAWAY = 1, 2, 3, 6, 7
FIN = 1


class Connection:
    """One connection. `opened(id, headers)`, `data(id, bytes)` and `ended(id)` are called from `serve`."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer
        self.lock = threading.Lock()
        self.inflate = zlib.decompressobj(zdict=DICTIONARY)
        self.deflate = zlib.compressobj(zdict=DICTIONARY)

    def serve(self, opened, data, ended):
        while True:
            head = self.reader.read(8)
            if len(head) < 8:
                return
            first, second = struct.unpack(">II", head)
            flags, length = second >> 24, second & 0xFFFFFF
            body = self.reader.read(length)
            if not first >> 31:
                if body:
                    data(first, body)
                if flags & FIN:
                    ended(first)
                continue
            kind = first & 0xFFFF
            if kind == SYN_STREAM:
                stream = struct.unpack(">I", body[:4])[0] & 0x7FFFFFFF
                headers = self._headers(self.inflate.decompress(body[10:]))
                with self.lock:
                    block = self.deflate.compress(struct.pack(">I", 0)) + self.deflate.flush(zlib.Z_SYNC_FLUSH)
                    self._send(SYN_REPLY, struct.pack(">I", stream) + block)
                opened(stream, headers)
                if flags & FIN:
                    ended(stream)
            elif kind == PING:
                with self.lock:
                    self._send(PING, body)
            elif kind == RST_STREAM:
                ended(struct.unpack(">I", body[:4])[0] & 0x7FFFFFFF)
            elif kind == GOAWAY:
                return

    def send(self, stream, data, end=False):
        with self.lock:
            self.writer.sendall(struct.pack(">II", stream, (FIN if end else 0) << 24 | len(data)) + data)

    def _send(self, kind, body):
        self.writer.sendall(struct.pack(">II", 0x80030000 | kind, len(body)) + body)

    @staticmethod
    def _headers(block):
        (count,), at, headers = struct.unpack(">I", block[:4]), 4, {}
        for _ in range(count):
            pair = []
            for _ in range(2):
                (length,) = struct.unpack(">I", block[at : at + 4])
                pair.append(block[at + 4 : at + 4 + length].decode())
                at += 4 + length
            headers[pair[0].lower()] = pair[1]
        return headers
