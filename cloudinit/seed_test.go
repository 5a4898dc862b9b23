package cloudinit

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
)

const (
	testKey  = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMmM5PpVSBhN5hzDGgV0pPNjDk0kFv2Qsq9wG1kUu0Yv me@here"
	testUser = "#cloud-config\npackages:\n  - nginx\nruncmd:\n  - [touch, /done]\n"
	testNet  = "version: 2\nethernets:\n  eth0:\n    match: {name: \"e*\"}\n    dhcp4: true\n"
)

func seed(t testing.TB, c Config) []byte {
	t.Helper()
	b, err := c.Seed()
	testenv.Check(t, err)
	return b
}

// seen is what cloud-init's own data source reads from a seed.
type seen struct {
	InstanceID string         `json:"instance_id"`
	Hostname   string         `json:"hostname"`
	Keys       []string       `json:"keys"`
	UserData   string         `json:"user_data"`
	Network    map[string]any `json:"network"`
}

func read(t *testing.T, iso []byte, names string) (s seen) {
	t.Helper()
	testenv.NeedTools(t, "cloud-init", "isoinfo", "blkid", "python3")
	path := filepath.Join(t.TempDir(), "seed.iso")
	testenv.Check(t, os.WriteFile(path, iso, 0o600))
	cmd := exec.Command("/usr/bin/python3", "reader_test.py", path, names) // the one that cloud-init is installed for
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	testenv.Check(t, err)
	testenv.Check(t, json.Unmarshal(out, &s))
	return s
}

// cloud-init reads what was asked for, by the names of Rock Ridge and of Joliet.
func TestCloudInitReads(t *testing.T) {
	c := Config{Name: "web", Hostname: "web.example.org", UserData: []byte(testUser), Network: []byte(testNet), Keys: []string{testKey}}
	for _, names := range []string{"-R", "-J"} {
		got := read(t, seed(t, c), names)
		want := seen{InstanceID: instanceID("web"), Hostname: "web.example.org", Keys: []string{testKey}, UserData: testUser,
			Network: map[string]any{"version": 2.0, "ethernets": map[string]any{"eth0": map[string]any{"match": map[string]any{"name": "e*"}, "dhcp4": true}}}}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v\nwant %+v", names, got, want)
		}
	}
	// A large file, and no others.
	large := "#cloud-config\n# " + strings.Repeat("x", 300<<10) + "\n"
	got := read(t, seed(t, Config{Name: "web", UserData: []byte(large)}), "-R")
	if got.UserData != large || got.Hostname != "web" || len(got.Keys) != 0 {
		t.Errorf("%d bytes of user-data, %q, %q", len(got.UserData), got.Hostname, got.Keys)
	}
}

// The schema of cloud-init takes what this package makes if there is no user-data, and what
// passes its check.
func TestCloudInitSchema(t *testing.T) {
	testenv.NeedTools(t, "cloud-init")
	for _, text := range []string{"#cloud-config\n{}\n", testUser} {
		testenv.Check(t, CheckUserData([]byte(text)))
		path := filepath.Join(t.TempDir(), "user-data")
		testenv.Check(t, os.WriteFile(path, []byte(text), 0o600))
		if out, err := exec.Command("cloud-init", "schema", "--config-file", path).CombinedOutput(); err != nil {
			t.Errorf("%q: %v\n%s", text, err, out)
		}
	}
}

// A seed is the same for a name, and a copy's is another instance and else the same.
func TestRenew(t *testing.T) {
	c := Config{Name: "web", UserData: []byte(testUser), Keys: []string{testKey}}
	first := seed(t, c)
	if !bytes.Equal(first, seed(t, c)) {
		t.Error("two seeds of one configuration differ")
	}
	one, err := Renew(first)
	testenv.Check(t, err)
	two, err := Renew(one)
	testenv.Check(t, err)
	of := map[string]seen{}
	for name, iso := range map[string][]byte{"first": first, "one": one, "two": two} {
		s := read(t, iso, "-R")
		if !strings.HasPrefix(s.InstanceID, "govmm-web") || len(iso) != len(first) {
			t.Errorf("%s: instance %q", name, s.InstanceID)
		}
		for other, o := range of {
			if o.InstanceID == s.InstanceID {
				t.Errorf("%s and %s are the same instance", name, other)
			}
			o.InstanceID = s.InstanceID
			if !reflect.DeepEqual(o, s) {
				t.Errorf("%s and %s differ: %+v, %+v", name, other, s, o)
			}
		}
		of[name] = s
	}
	for _, bad := range [][]byte{nil, make([]byte, 100<<10), first[:len(first)-sector]} {
		if _, err := Renew(bad); !errors.Is(err, ErrNoSeed) {
			t.Errorf("%d bytes: %v", len(bad), err)
		}
	}
}

func TestChecks(t *testing.T) {
	for text, want := range map[string]string{
		"":                           "0 bytes",
		"packages: [a]\n":            `found "packages: [a]"`,
		"#cloud-config\na: [\n":      "line 2",
		"#cloud-config\na: 1\na: 2":  "already defined",
		"#cloud-config\n- a\n":       "cannot unmarshal",
		"#cloud-config\n\ta: b\n":    "line",
		strings.Repeat("#", 2<<20):   "between 1 and",
		"#cloud-config\n":            "",
		"#cloud-config # mine\na: 1": "",
		"#!/bin/sh\necho [\n":        "",
		"Content-Type: multipart/mixed; boundary=x\n": "",
		"#cloud-config-archive\n- a\n":                "",
		"## template: jinja\n#cloud-config\na: [":     "",
		"\x1f\x8b\x08":                      "",
		"#include\nhttps://example.org/x\n": "",
	} {
		_, err := Config{Name: "a", UserData: []byte(text)}.Seed()
		if text == "" {
			err = CheckUserData(nil)
		}
		checkError(t, text, err, want)
	}
	for text, want := range map[string]string{
		testNet: "", "network:\n  version: 1\n  config: []\n": "", "version: 3": "version: 1 or version: 2", "ethernets: {}": "found \"<nil>\"", "- a": "cannot unmarshal", "a: [": "line 1"} {
		_, err := Config{Name: "a", Network: []byte(text)}.Seed()
		checkError(t, text, err, want)
	}
	for text, want := range map[string]string{"a": "", "a-1.example.org": "", "a b": "host name", "-a": "host name", "a.": "host name", "a_b": "host name", strings.Repeat("a", 64): "host name", "a\nb: c": "host name"} {
		_, err := Config{Name: "a", Hostname: text}.Seed()
		checkError(t, text, err, want)
	}
}

func checkError(t *testing.T, text string, err error, want string) {
	t.Helper()
	if (err == nil) != (want == "") || err != nil && (!strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n")) {
		t.Errorf("%.60q: %v; want one with %q", text, err, want)
	}
}

func TestKeys(t *testing.T) {
	for text, want := range map[string]string{
		testKey: "", testKey + "\n\n# mine\n" + testKey + "\n": "",
		`from="10.0.0.1",no-pty ` + testKey: "",
		"":                                  "between 1 and",
		"\n#\n":                             "no key",
		"-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNza\n": "private key",
		"PuTTY-User-Key-File-3: ssh-ed25519\n":             "private key",
		"hello":                                            "expected a public key",
		"ssh-ed25519":                                      "expected a public key",
		"ssh-ed25519 hello":                                "expected a public key",
		"ssh-ed25519 AAAAB3NzaC1yc2E= x":                   "another type",
		"ssh-ed25519 AAAAC3Nz":                             "is cut",
		testKey + "\nnonsense\n":                           "line 2",
		testKey + "\x1b[2J":                                "control characters",
		strings.Repeat(testKey+"\n", 65):                   "more than 64",
	} {
		keys, err := ParseKeys([]byte(text))
		checkError(t, text, err, want)
		if want == "" && keys[len(keys)-1] != strings.TrimSpace(strings.Split(strings.TrimSpace(text), "\n")[strings.Count(strings.TrimSpace(text), "\n")]) {
			t.Errorf("%q: %q", text, keys)
		}
		if err != nil && strings.Contains(err.Error(), "b3BlbnNza") {
			t.Errorf("the private key is in the error: %v", err)
		}
	}
	testenv.NeedTools(t, "ssh-keygen")
	for _, kind := range []string{"ed25519", "rsa", "ecdsa"} {
		path := filepath.Join(t.TempDir(), "key")
		if out, err := exec.Command("ssh-keygen", "-q", "-t", kind, "-N", "", "-f", path).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		public, err := os.ReadFile(path + ".pub")
		testenv.Check(t, err)
		if _, err := ParseKeys(public); err != nil {
			t.Errorf("%s: %v", kind, err)
		}
		private, err := os.ReadFile(path)
		testenv.Check(t, err)
		if _, err := ParseKeys(private); err == nil || !strings.Contains(err.Error(), "private key") {
			t.Errorf("%s: %v", kind, err)
		}
	}
}

// What is not a seed is an error; what is one is renewed as often as one likes.
func FuzzRenew(f *testing.F) {
	f.Add(seed(f, Config{Name: "a", UserData: []byte(testUser), Network: []byte(testNet), Keys: []string{testKey}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		once, err := Renew(b)
		if err != nil {
			return
		}
		if _, err := Renew(once); err != nil {
			t.Fatal(err)
		}
	})
}

// Files are seeds, or refused in a line.
func FuzzSeed(f *testing.F) {
	f.Add([]byte(testUser), []byte(testNet), []byte(testKey))
	f.Add([]byte("#cloud-config\na: &a [*a]\n"), []byte("version: 2"), []byte("a"))
	f.Fuzz(func(t *testing.T, user, network, keys []byte) {
		list, err := ParseKeys(keys)
		if err != nil && strings.Contains(err.Error(), "\n") {
			t.Fatalf("%q", err)
		}
		if _, err := (Config{Name: "a", UserData: user, Network: network, Keys: list}).Seed(); err != nil && strings.Contains(err.Error(), "\n") {
			t.Fatalf("%q", err)
		}
	})
}
