package api

import "testing"

func TestDirectory(t *testing.T) {
	owners := map[string]int{"/run/user/0": 0, "/run/user/1000": 1000, "/tmp/mine": 0, "/tmp/his": 1001, UnitDirectory: 990}
	owner := func(dir string) int {
		if uid, ok := owners[dir]; ok {
			return uid
		}
		return -1
	}
	for _, c := range []struct {
		name string
		uid  int
		xdg  string
		want string
	}{
		{"root", 0, "", "/run/govmm"},
		{"root by login", 0, "/run/user/0", "/run/govmm"},
		{"root by sudo -E", 0, "/run/user/1000", "/run/govmm"},
		{"root with a place of its own", 0, "/tmp/mine", "/tmp/mine/govmm"},
		{"a place yet to be made", 0, "/tmp/new", "/tmp/new/govmm"},
		{"user", 1000, "/run/user/1000", "/run/user/1000/govmm"},
		{"relative", 1000, "x", "/run/user/1000/govmm"},
		{"somebody else's", 1000, "/tmp/his", "/run/user/1000/govmm"},
		{"user without it", 1000, "", "/run/user/1000/govmm"},
		{"user of the units", 990, "", UnitDirectory},
		{"user of the units with a place of its own", 990, "/tmp/new", "/tmp/new/govmm"},
		{"user without any", 1002, "", "/tmp/govmm-1002"},
	} {
		if got := directory(c.uid, c.xdg, owner); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}
