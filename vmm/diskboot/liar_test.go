package diskboot_test

import (
	"encoding/binary"
	"encoding/json"
	"os"

	"github.com/govmm/govmm/vmm/diskboot/wire"
)

// lies are what a reader that a disk has taken over may answer, and what comes of it.
var lies = map[string]string{
	"an answer within":     "an answer within the kernel",
	"a long frame":         "a frame of 4294967295 bytes",
	"an unknown frame":     `a frame 'X' of 0 bytes`,
	"a read outside":       "it asks for 8 bytes at 1048570 of a disk of 1048576",
	"a negative read":      "it asks for",
	"a huge kernel":        "a size of the kernel of 1099511627776 bytes",
	"a negative kernel":    "a size of the kernel of -1 bytes",
	"a huge initrd":        "a size of the initial RAM disk of 1099511627776 bytes",
	"no kernel":            "without a kernel",
	"no entry":             "answered with 0 entries",
	"a long chunk":         "a frame 'B' of 100 bytes within the kernel",
	"an empty chunk":       "within the kernel",
	"an end within":        "has ended",
	"a long command line":  "a command line of 5000 bytes",
	"an evil command line": "no line of text",
	"no JSON":              "invalid character",
	"an escape":            "??[2Jx",
}

func lie(c *os.File) {
	_, b, err := wire.Next(c, make([]byte, wire.MaxFrame))
	if err != nil {
		os.Exit(1)
	}
	var q wire.Question
	_ = json.Unmarshal(b, &q)
	say := func(kind byte, p []byte) {
		_ = wire.Write(c, kind, p)
	}
	reply := func(r wire.Reply) {
		b, _ := json.Marshal(r)
		say(wire.Answer, b)
	}
	read := func(off uint64, n uint32) {
		p := binary.LittleEndian.AppendUint64(nil, off)
		say(wire.Read, binary.LittleEndian.AppendUint32(p, n))
	}
	one := []wire.Entry{{ID: "x"}}
	switch q.Entry {
	case "an answer within":
		reply(wire.Reply{Entries: one, Kernel: 10})
		reply(wire.Reply{Entries: one, Kernel: 10})
	case "a long frame":
		_, _ = c.Write([]byte{wire.Answer, 0xff, 0xff, 0xff, 0xff})
	case "an unknown frame":
		say('X', nil)
	case "a read outside":
		read(1<<20-6, 8)
	case "a negative read":
		read(1<<63, 8)
	case "a huge kernel":
		reply(wire.Reply{Entries: one, Kernel: 1 << 40})
	case "a negative kernel":
		reply(wire.Reply{Entries: one, Kernel: -1})
	case "a huge initrd":
		reply(wire.Reply{Entries: one, Kernel: 1, Initrd: 1 << 40})
		say(wire.Bytes, []byte("k"))
	case "no kernel":
		reply(wire.Reply{Entries: one})
	case "no entry":
		reply(wire.Reply{Kernel: 1})
	case "a long chunk":
		reply(wire.Reply{Entries: one, Kernel: 10})
		say(wire.Bytes, make([]byte, 100))
	case "an empty chunk":
		reply(wire.Reply{Entries: one, Kernel: 10})
		say(wire.Bytes, nil)
	case "an end within":
		reply(wire.Reply{Entries: one, Kernel: 10})
		os.Exit(3)
	case "a long command line":
		reply(wire.Reply{Entries: []wire.Entry{{Cmdline: string(make([]byte, 5000))}}, Kernel: 1})
	case "an evil command line":
		reply(wire.Reply{Entries: []wire.Entry{{Cmdline: "a\nb"}}, Kernel: 1})
	case "no JSON":
		say(wire.Answer, []byte("x"))
	case "an escape":
		reply(wire.Reply{Error: "\x1b\x1b[2Jx"})
	}
	_, _, _ = wire.Next(c, make([]byte, wire.MaxFrame))
	os.Exit(0)
}
