package api

import "testing"

func TestDirectory(t *testing.T) {
	for _, c := range []struct {
		name  string
		uid   int
		env   map[string]string
		owned bool
		want  string
	}{
		{"root", 0, nil, true, "/run/govmm"},
		{"root keeps to /run", 0, map[string]string{"XDG_RUNTIME_DIR": "/run/user/0"}, true, "/run/govmm"},
		{"user", 1000, map[string]string{"XDG_RUNTIME_DIR": "/run/user/1000"}, true, "/run/user/1000/govmm"},
		{"relative XDG", 1000, map[string]string{"XDG_RUNTIME_DIR": "x"}, false, "/tmp/govmm-1000"},
		{"no XDG", 1000, nil, true, "/run/user/1000/govmm"},
		{"no XDG, no /run/user", 1000, nil, false, "/tmp/govmm-1000"},
		{"override", 0, map[string]string{DirectoryVariable: "/x"}, true, "/x"},
	} {
		got := directory(c.uid, func(k string) string { return c.env[k] }, func(string, int) bool { return c.owned })
		if got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}
