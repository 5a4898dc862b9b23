package migrate

import (
	"os"
	"regexp"
	"strconv"
	"testing"
)

// The numbers of frames are those of docs/migration.md, whatever is added: two versions
// understand each other by them.
func TestFrameNumbers(t *testing.T) {
	page, err := os.ReadFile("../docs/migration.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]frameType{}
	for _, row := range regexp.MustCompile(`(?m)^\| (\d+) \| ([A-Z_]+) \| (?:source|destination|both) \|`).FindAllStringSubmatch(string(page), -1) {
		n, err := strconv.Atoi(row[1])
		if err != nil {
			t.Fatal(err)
		}
		documented[row[2]] = frameType(n)
	}
	for typ := range frameType(255) {
		name := typ.String()
		if n, ok := documented[name]; ok != (name != frameType(255).String() && !regexp.MustCompile("^type ").MatchString(name)) || ok && n != typ {
			t.Errorf("%s is %d, documented as %d (%v)", name, typ, n, ok)
		}
		delete(documented, name)
	}
	for name, n := range documented {
		t.Errorf("%s is documented as %d, and is no frame", name, n)
	}
	// Those of v0.1.0, which has the same version of the protocol.
	for name, want := range map[frameType]frameType{frameConfig: 1, framePages: 2, frameRound: 3, frameHashes: 4, frameState: 5, frameCommit: 6,
		frameAbort: 7, framePacked: 8, frameProbe: 32, frameHelloOK: 64, frameRefused: 65, frameReady: 66, framePrepared: 67, frameRunning: 68,
		frameFailed: 69, frameVerdict: 70} {
		if name != want {
			t.Errorf("%v is %d, was %d", name, name, want)
		}
	}
}
