package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the schemas in docs")

// config runs govmm config, and returns what it prints, or its error.
func config(args ...string) (string, error) {
	root := newRoot([]string{"config"})
	var out bytes.Buffer
	root.SetOut(&out)
	root.SetArgs(append([]string{"config"}, args...))
	err := root.Execute()
	return out.String(), err
}

func writeConfig(t testing.TB, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "vm.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// A fault in a file is said in one line, with the line of the file.
func TestConfigFaults(t *testing.T) {
	for _, c := range []struct{ text, says string }{
		{"memory: 128M\nmemroy: 3G\n", `vm.yaml:2: unknown key "memroy"; did you mean memory?`},
		{"zzzzzzzz: 1\n", "govmm config --schema"},
		{"config: other.yaml\n", `vm.yaml:1: unknown key "config"`},
		{"prefill: true\n", `vm.yaml:1: unknown key "prefill"`},
		{"memory: 128M\n\ninitrd: x\n", "--initrd and --no-unpack need --kernel (vm.yaml:3)"},
		{"disk:\n- path: a\n- path: b\n  size: 3\n", `"size" is unknown: use path=, readonly, direct, id=, queues=, format=, ephemeral, bps=, iops= (a comma in a path is written twice) (vm.yaml:3)`},
		{"disk: [{path: a, path: b}]\n", `vm.yaml:1: "path" is given twice`},
		{"memory: [1\n", "vm.yaml:1: "},
		{"memory: 1M\n---\nmemory: 2M\n", `vm.yaml:2: a second document`},
		{"memory: 1M\n--- {a\n", `vm.yaml:`},
		{"memory: 1M\nmemory: 2M\n", `vm.yaml:2: "memory" is given twice, first at line 1`},
		{"memory: 12\n", "must be a multiple of 4K between 1M and 16T (vm.yaml:1)"},
		{"cpus: many\n", "vm.yaml:1: cpus: "},
		{"cpus: {n: 2}\n", `vm.yaml:1: `},
		{"balloon: maybe\n", "vm.yaml:1: balloon: "},
		{"- memory\n", "vm.yaml:1: expected keys and values"},
		{"cmdline: [a, b]\n", "vm.yaml:1: cmdline: expected one value"},
		{"restore: eager\n", "--restore needs --from (vm.yaml:1)"},
		{"console: stdio\nserial: stdio\n", "(vm.yaml:1, vm.yaml:2)"},
	} {
		_, err := config(writeConfig(t, c.text))
		if err == nil || !strings.Contains(strings.ReplaceAll(stripDirs(err.Error()), "\n", "|"), c.says) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, want %q", c.text, err, c.says)
		}
	}
}

// stripDirs leaves of paths of the test's files their last element.
func stripDirs(s string) string {
	fields := strings.Split(s, " ")
	for i, f := range fields {
		open := strings.HasPrefix(f, "(")
		if at := strings.LastIndex(f, "/"); at >= 0 && strings.Contains(f, "vm.yaml") {
			fields[i] = f[at+1:]
			if open {
				fields[i] = "(" + fields[i]
			}
		}
	}
	return strings.Join(fields, " ")
}

// What is printed says the same when it is read again, in YAML and JSON.
func TestConfigIsItsOwnInput(t *testing.T) {
	first, err := config(writeConfig(t, `
name: web
memory: 1G
cpus: 2
cmdline: "quiet  root=/dev/vda"
disk:
- {path: "a,b.img", readonly: true, id: root}
- path=c.img
net: {tap: tap0, mac: "52:54:00:00:00:02"}
serial: "null"
sandbox: off
migrate-ports: [1, 2]
`))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"name: web\n", "cpus: 2\n", "sandbox: \"off\"\n", "- path=a,,b.img,readonly,id=root\n", "- tap=tap0,mac=52:54:00:00:00:02\n", "migrate-ports:\n"} {
		if !strings.Contains(first, want) {
			t.Errorf("%q is not in\n%s", want, first)
		}
	}
	again, err := config(writeConfig(t, first))
	if err != nil || again != first {
		t.Errorf("read again: %v\n%s\nwas\n%s", err, again, first)
	}
	asJSON, err := config("--json", writeConfig(t, first))
	if err != nil || !json.Valid([]byte(asJSON)) {
		t.Fatalf("%v, %s", err, asJSON)
	}
	if again, err = config(writeConfig(t, asJSON)); err != nil || again != first {
		t.Errorf("read from JSON: %v\n%s\nwas\n%s", err, again, first)
	}
}

// The command line wins, and a device's names become words.
func TestConfigAndFlags(t *testing.T) {
	cmd := newReceive()
	path := writeConfig(t, "listen: 127.0.0.1:7000\ndisk:\n  root: {path: /r}\n  data: {path: /d, copy: true}\nnet:\n  52:54:00:00:00:02: {tap: t}\nserial: \"null\"\n")
	for _, set := range [][2]string{{"config", path}, {"listen", "127.0.0.1:8000"}} {
		if err := cmd.Flags().Set(set[0], set[1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := cmd.PreRunE(cmd, nil); err != nil {
		t.Fatal(err)
	}
	got := map[string]any{}
	for _, e := range sayAll(cmd.Flags()) {
		got[e.key] = e.value
	}
	if got["listen"] != "127.0.0.1:8000" || got["serial"] != "null" ||
		!slices.Equal(got["disk"].([]string), []string{"path=/r,for=root", "path=/d,copy,for=data"}) ||
		!slices.Equal(got["net"].([]string), []string{"tap=t,mac=52:54:00:00:00:02"}) {
		t.Errorf("%v", got)
	}
}

// The schemas in docs are those that are printed, and know all keys.
func TestConfigSchema(t *testing.T) {
	for _, c := range []struct {
		file string
		args []string
	}{{"config.schema.json", nil}, {"receive.schema.json", []string{"--receive"}}} {
		text, err := config(append([]string{"--schema"}, c.args...)...)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join("../../docs", c.file)
		if *update {
			if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		committed, err := os.ReadFile(file)
		if err != nil || string(committed) != text {
			t.Errorf("%s is not what is printed (%v): go test ./cmd/govmm -run TestConfigSchema -update", file, err)
		}
		var schema struct {
			Properties map[string]map[string]any
		}
		if err := json.Unmarshal([]byte(text), &schema); err != nil {
			t.Fatal(err)
		}
		cmd := newRun()
		if c.args != nil {
			cmd = newReceive()
		}
		for _, e := range sayAll(cmd.Flags()) {
			if schema.Properties[e.key] == nil {
				t.Errorf("%s: %q is missing", c.file, e.key)
			}
		}
		if disk, _ := json.Marshal(schema.Properties["disk"]); !strings.Contains(string(disk), `"path"`) {
			t.Errorf("%s: a disk has no path: %s", c.file, disk)
		}
	}
}

// FuzzConfigFile: whatever a file has, it is read or refused in one line.
func FuzzConfigFile(f *testing.F) {
	f.Add("memory: 1G\ndisk: [{path: a}]\n")
	f.Add("a: &x [*x]\n")
	f.Add("disk: {root: {path: /r}}\n")
	f.Fuzz(func(t *testing.T, text string) {
		cmd := newRun()
		c := &configFile{path: "f", lines: map[string]int{}, flags: cmd.Flags()}
		if err := c.apply([]byte(text)); err != nil && strings.Contains(err.Error(), "\n") {
			t.Errorf("%q", err)
		}
	})
}
