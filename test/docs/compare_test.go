package docs

import (
	"slices"
	"testing"
)

// What a page says is compared: words must be those that were printed, figures need not.
func TestCompare(t *testing.T) {
	s := shell{dir: "/tmp/gd1"}
	printed := "NAME  STATE\none   running  12\ngovmm: listening on 127.0.0.1:41234\ngovmm: run two: disk /tmp/gd1/a.img: lock: another process uses it\n"
	for line, want := range map[string]bool{
		"NAME  STATE":                        true,
		"NAME   STATE":                       true,
		"NAME  STATUS":                       false,
		"two  running  99":                   true, // figures: not compared
		"...":                                true,
		"govmm: listening on 127.0.0.1:7000": true,
		"govmm: listens on 127.0.0.1:7000":   false,
		"govmm: run two: disk a.img: lock: another process uses it":          true,
		"govmm: run two: disk /home/me/a.img: lock: another process uses it": true,
		"govmm: run two: disk b.img: lock: another process uses it":          false,
	} {
		if err := s.compare([]string{line}, printed); (err == nil) != want {
			t.Errorf("%q: %v", line, err)
		}
	}
}

// Blocks with a prompt have commands and output; without one they are commands, or no shell block.
func TestSteps(t *testing.T) {
	for _, c := range []struct {
		lines, want []string
	}{
		{[]string{"$ govmm ps", "NAME  STATE", `$ govmm run \`, "    --cpus 2"}, []string{"govmm ps", "govmm run --cpus 2"}},
		{[]string{"go test ./x", "", "# a comment", "make"}, []string{"go test ./x", "make"}},
		{[]string{"host b$ govmm ps"}, []string{"govmm ps"}},
		{[]string{"govmm: listening on :7000"}, nil},
		{[]string{"govmm demo guest: 2 vCPUs"}, nil},
		{[]string{"source   destination"}, nil},
	} {
		var got []string
		for _, s := range stepsOf(c.lines, 1) {
			got = append(got, s.command)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%q: expected %q, found %q", c.lines, c.want, got)
		}
	}
}
