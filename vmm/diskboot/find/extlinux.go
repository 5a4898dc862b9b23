package find

import (
	"fmt"
	"path"
	"strings"
)

// extlinuxConfigs are where extlinux, syslinux and isolinux, and U-Boot, look.
var extlinuxConfigs = []string{"/boot/extlinux/extlinux.conf", "/extlinux/extlinux.conf", "/boot/extlinux.conf", "/extlinux.conf",
	"/boot/syslinux/extlinux.conf", "/boot/syslinux/syslinux.cfg", "/syslinux/syslinux.cfg", "/syslinux.cfg", "/boot/isolinux/isolinux.cfg", "/isolinux/isolinux.cfg", "/isolinux.cfg"}

const maxIncludes = 16 // of a configuration, those of included ones too

// extlinux is a configuration that is being read.
type extlinux struct {
	v     *volume
	dir   string // to which names are relative
	file  string
	lines int
	seen  map[string]bool // files

	def, menuDefault string // labels
	common           string // APPEND before the first label
	entries          []*Entry
	appends          map[*Entry]string
	entry            *Entry
}

// extlinuxSystem reads the entries of a configuration; nil: there is none.
func (s *search) extlinuxSystem(v *volume, file string) ([]*Entry, error) {
	text, ok := v.text(file)
	if !ok {
		return nil, nil
	}
	x := &extlinux{v: v, dir: path.Dir(file), file: file, appends: make(map[*Entry]string), seen: map[string]bool{file: true}}
	if err := x.read(text); err != nil {
		return nil, err
	}
	var entries []*Entry
	for _, e := range x.entries {
		if e.kernel.path == "" {
			continue
		}
		options, own := x.appends[e]
		if !own {
			options = x.common
		} else if options == "-" {
			options = ""
		}
		e.Cmdline = options
		for word := range strings.FieldsSeq(options) {
			if names, ok := strings.CutPrefix(word, "initrd="); ok && len(e.initrds) == 0 {
				e.initrds = x.refs(names)
			}
		}
		entries = append(entries, e)
	}
	for _, label := range []string{x.menuDefault, x.def} {
		for _, e := range entries {
			if label != "" && e.ID == label {
				e.Default = true
				return entries, nil
			}
		}
	}
	if len(entries) > 0 {
		entries[0].Default = true
	}
	return entries, nil
}

// ref is a file, relative to the configuration's directory.
func (x *extlinux) ref(name string) ref {
	if !strings.HasPrefix(name, "/") {
		name = path.Join(x.dir, name)
	}
	return ref{x.v, path.Clean(name)}
}

func (x *extlinux) refs(names string) (list []ref) {
	for _, n := range strings.Split(names, ",") {
		if n = strings.TrimSpace(n); n != "" && len(list) < 64 {
			list = append(list, x.ref(n))
		}
	}
	return list
}

// read reads lines. Keywords are the same in upper and lower case.
func (x *extlinux) read(text string) error {
	for line := range strings.Lines(text) {
		if x.lines++; x.lines > maxNodes {
			return fmt.Errorf("more than %d lines", maxNodes)
		}
		key, value := keyword(line)
		switch key {
		case "include":
			if err := x.include(value); err != nil {
				return err
			}
		case "default", "ontimeout":
			if key == "default" || x.def == "" {
				x.def, _, _ = strings.Cut(value, " ")
			}
		case "label":
			if len(x.entries) >= maxEntries {
				return nil
			}
			x.entry = &Entry{ID: value, Title: value, Source: x.v.at(x.file)}
			x.entries = append(x.entries, x.entry)
		case "menu":
			x.menu(value)
		case "append":
			if x.entry == nil {
				x.common = value
			} else {
				x.appends[x.entry] = value
			}
		case "linux", "kernel":
			name, _, _ := strings.Cut(value, " ")
			if x.entry != nil && name != "" && !strings.HasSuffix(name, ".c32") && !strings.HasSuffix(name, ".0") && !strings.HasSuffix(name, ".bin") {
				x.entry.kernel = x.ref(name)
			}
		case "initrd":
			if x.entry != nil {
				x.entry.initrds = x.refs(value)
			}
		}
	}
	return nil
}

// keyword splits a line.
func keyword(line string) (key, value string) {
	line = strings.TrimSpace(line)
	if i := strings.IndexAny(line, " \t"); i >= 0 {
		line, value = line[:i], strings.TrimSpace(line[i:])
	}
	return strings.ToLower(line), value
}

func (x *extlinux) menu(value string) {
	switch key, value := keyword(value); key {
	case "label":
		if x.entry != nil && value != "" {
			x.entry.Title = strings.ReplaceAll(value, "^", "")
		}
	case "default":
		if x.entry != nil {
			x.menuDefault = x.entry.ID
		}
	case "include":
		_ = x.include(value)
	}
}

// include reads another file, each one once.
func (x *extlinux) include(value string) error {
	name, _, _ := strings.Cut(value, " ")
	at := x.ref(name).path
	if x.seen[at] {
		return nil
	}
	if len(x.seen) > maxIncludes {
		return fmt.Errorf("more than %d files are included", maxIncludes)
	}
	x.seen[at] = true
	if text, ok := x.v.text(at); ok {
		return x.read(text)
	}
	return nil
}
