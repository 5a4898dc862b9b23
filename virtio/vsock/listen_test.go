package vsock

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "v")
	make := func(path string) *Device {
		d, err := New(Config{Path: path}, nil)
		check(t, err)
		t.Cleanup(func() { check(t, d.Close()) })
		return d
	}
	d := make(path)
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("a device that does not listen has made its socket: %v", err)
	}
	check(t, d.Listen())
	check(t, d.Listen())
	st, err := os.Lstat(path)
	check(t, err)
	if st.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("mode %v", st.Mode())
	}
	other := make(path)
	if err := other.Listen(); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), path) {
		t.Errorf("a socket in use: %v", err)
	}
	dial(t, path) // it was not disturbed
	check(t, d.Unlisten())
	check(t, d.Unlisten())
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("the socket stays: %v", err)
	}
	check(t, other.Listen())
	check(t, d.Close()) // must not take away what is the other's
	dial(t, path)
	if err := d.Listen(); !errors.Is(err, ErrInUse) {
		t.Errorf("%v", err)
	}

	stale := filepath.Join(dir, "stale")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	check(t, err)
	l.SetUnlinkOnClose(false)
	check(t, l.Close())
	check(t, make(stale).Listen())
	dial(t, stale)

	file := filepath.Join(dir, "file")
	check(t, os.WriteFile(file, []byte("precious"), 0o600))
	if err := make(file).Listen(); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("a file: %v", err)
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Errorf("the file is %q, %v", b, err)
	}
	if err := make(filepath.Join(dir, "none", "v")).Listen(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}

	// Listen waits for another process with the lock, but not for ever.
	held, err := os.Open(dir)
	check(t, err)
	check(t, unix.Flock(int(held.Fd()), unix.LOCK_EX))
	if err := make(filepath.Join(dir, "w")).Listen(); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("%v", err)
	}
	go func() {
		time.Sleep(50 * time.Millisecond)
		_ = held.Close()
	}()
	check(t, make(filepath.Join(dir, "w")).Listen())
}

// Of many that find the same left-over socket at once, one gets it.
func TestListenRace(t *testing.T) {
	for range 20 {
		path := filepath.Join(t.TempDir(), "v")
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		check(t, err)
		l.SetUnlinkOnClose(false)
		check(t, l.Close())
		devices := make([]*Device, 8)
		errs := make([]error, len(devices))
		var all sync.WaitGroup
		for i := range devices {
			devices[i], err = New(Config{Path: path}, nil)
			check(t, err)
			all.Go(func() { errs[i] = devices[i].Listen() })
		}
		all.Wait()
		won := 0
		for i, d := range devices {
			if errs[i] == nil {
				won++
			} else if !errors.Is(errs[i], ErrInUse) {
				t.Error(errs[i])
			}
			defer func() { check(t, d.Close()) }()
		}
		if won != 1 {
			t.Fatalf("%d devices listen", won)
		}
		dial(t, path)
	}
}

func TestParseConfig(t *testing.T) {
	for option, want := range map[string]Config{
		"/run/x.sock":                         {Path: "/run/x.sock"},
		"path=x":                              {Path: "x"},
		"cid=3,path=/run/x.sock":              {CID: 3, Path: "/run/x.sock"},
		"path=a,,b,cid=4294967294":            {CID: MaxCID, Path: "a,b"},
		"path=a=b":                            {Path: "a=b"},
		"./@x,cid=5":                          {CID: 5, Path: "./@x"},
		"/" + strings.Repeat("d/", 100) + "s": {Path: "/" + strings.Repeat("d/", 100) + "s"},
		strings.Repeat("x", maxPath):          {Path: strings.Repeat("x", maxPath)},
	} {
		if got, err := ParseConfig(option); err != nil || got != want {
			t.Errorf("%q: %+v, %v", option, got, err)
		}
	}
	for option, say := range map[string]string{
		"":                      "path=PATH is missing",
		"cid=3":                 "path=PATH is missing",
		"path=x,cid=2":          "between 3 and 4294967294",
		"path=x,cid=4294967295": "between 3 and 4294967294",
		"path=x,cid=":           "between 3 and",
		"path=x,cid=0x4":        "between 3 and",
		"path=x,path=y":         "given twice",
		"path=x,port=2":         "\"port\" is unknown",
		"path=x,y":              "\"y\" is unknown",
		"path=@abstract":        "must be a file",
		"path=\x00":             "zero byte",
		strings.Repeat("d/", 100) + strings.Repeat("x", maxName+1): "its last element at most 64",
		"/" + strings.Repeat("d/", longest/2) + "s":                "at most",
		strings.Repeat("x", maxPath+1):                             "at most 96 bytes",
	} {
		if c, err := ParseConfig(option); err == nil || !strings.Contains(err.Error(), say) {
			t.Errorf("%q: %+v, %v; expected was %q", option, c, err, say)
		}
	}
	if _, err := New(Config{CID: 1, Path: "x"}, nil); err == nil {
		t.Error("a guest with the hypervisor's CID")
	}
}

func TestConfigRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := Config{Path: rapid.StringMatching(`[a-z,=/. ]{1,40}`).Draw(t, "path")}
		if rapid.Bool().Draw(t, "named") {
			c.CID = rapid.Uint32Range(MinCID, MaxCID).Draw(t, "cid")
		}
		if got, err := ParseConfig(c.String()); err != nil || got != c {
			t.Fatalf("%q: %+v, %v", c, got, err)
		}
	})
}
