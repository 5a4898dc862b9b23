package find

import (
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"
)

const (
	maxSteps   = 200_000 // commands that are carried out
	maxCalls   = 16      // functions and files within each other
	maxEntries = 256
	maxValue   = 64 << 10 // bytes of all words of a command
)

// grub carries out a configuration of GRUB's.
type grub struct {
	s         *search
	vars      map[string]string
	functions map[string][]command
	steps     int
	calls     int

	entries []*menu // of the menu that is being filled
	n       int
	entry   *Entry // what the commands linux and initrd fill; nil: outside of an entry
}

// menu is an entry, or a submenu.
type menu struct {
	title, id string
	body      []command
	vars      map[string]string
	sub       []*menu // of a submenu
	isSub     bool
	bls       *Entry // from a file of the Boot Loader Specification
}

// errGrubSteps ends a configuration that goes on and on.
var errGrubSteps = fmt.Errorf("more than %d commands were carried out", maxSteps)

// errGrubReturn ends a function or a file.
var errGrubReturn = errors.New("return")

// grubConfigs are where distributions have it.
var grubConfigs = []string{"/boot/grub/grub.cfg", "/boot/grub2/grub.cfg", "/grub/grub.cfg", "/grub2/grub.cfg",
	"/EFI/debian/grub.cfg", "/EFI/ubuntu/grub.cfg", "/EFI/fedora/grub.cfg", "/EFI/alpine/grub.cfg", "/EFI/BOOT/grub.cfg"}

// newGrub prepares for a configuration in a volume.
func newGrub(s *search, v *volume, file string) *grub {
	g := &grub{s: s, functions: make(map[string][]command)}
	root := v.grub()
	g.vars = map[string]string{"root": root, "prefix": "(" + root + ")" + path.Dir(file), "config_directory": "(" + root + ")" + path.Dir(file), "grub_platform": "pc", "grub_cpu": "i386",
		"feature_menuentry_id": "y", "feature_default_font_path": "y", "feature_platform_search_hint": "y", "feature_timeout_style": "y",
		"feature_all_video_module": "y", "feature_menuentry_options": "y", "feature_chainloader_bpb": "y", "feature_ntldr": "y", "feature_200_final": "y", "feature_nativedisk_cmd": "y"}
	return g
}

// grubSystem reads the entries of GRUB's configuration in a volume; nil: there is none.
func (s *search) grubSystem(v *volume, file string) ([]*Entry, error) {
	text, ok := v.text(file)
	if !ok {
		return nil, nil
	}
	list, err := parseGrub(text)
	if err != nil {
		return nil, err
	}
	g := newGrub(s, v, file)
	if _, err := g.run(list); err != nil && !errors.Is(err, errGrubReturn) {
		return nil, err
	}
	source := v.at(file)
	chosen := g.chosen(g.vars["default"], g.entries)
	var entries []*Entry
	var flatten func(list []*menu, prefix string, depth int)
	flatten = func(list []*menu, prefix string, depth int) {
		for _, m := range list {
			id := prefix + m.name()
			if m.isSub && depth < maxCalls {
				flatten(m.sub, id+">", depth+1)
				continue
			}
			e := g.evaluate(m)
			if e == nil || len(entries) >= maxEntries {
				continue
			}
			e.ID, e.Source, e.Default = id, source, m == chosen
			if m.bls != nil {
				e.Source = m.bls.Source
			}
			entries = append(entries, e)
		}
	}
	flatten(g.entries, "", 0)
	return entries, nil
}

// name is what an entry is chosen by.
func (m *menu) name() string {
	if m.id != "" {
		return m.id
	}
	return m.title
}

// chosen returns the entry that a value of default means: a number, an id or a title, with
// those of submenus before it. If there is none, it is the first one, as GRUB has it.
func (g *grub) chosen(value string, list []*menu) *menu {
	if len(list) == 0 {
		return nil
	}
	first, rest, _ := strings.Cut(value, ">")
	m := list[0]
	if n, err := strconv.Atoi(strings.TrimSpace(first)); err == nil && n >= 0 && n < len(list) {
		m = list[n]
	}
	for _, one := range list {
		if first != "" && (one.id == first || one.title == first) {
			m = one
			break
		}
	}
	if m.isSub {
		return g.chosen(rest, m.sub)
	}
	return m
}

// evaluate carries out an entry's commands; nil: it loads no Linux.
func (g *grub) evaluate(m *menu) *Entry {
	if m.bls != nil {
		e := *m.bls
		return &e
	}
	was := g.vars
	defer func() { g.vars, g.entry = was, nil }()
	g.vars = make(map[string]string, len(m.vars))
	for k, v := range m.vars {
		g.vars[k] = v
	}
	g.vars["chosen"] = m.name()
	g.entry = &Entry{Title: m.title}
	if _, err := g.run(m.body); err != nil && !errors.Is(err, errGrubReturn) || g.entry.kernel.path == "" {
		return nil
	}
	return g.entry
}

// expand turns words into arguments.
func (g *grub) expand(words []word) (args []string, err error) {
	total := 0
	for _, w := range words {
		var b strings.Builder
		any := false // an empty word counts if it was quoted
		for _, p := range w {
			text := p.text
			if p.variable {
				text = g.vars[p.text]
			}
			if total += len(text) + 1; total > maxValue {
				return nil, fmt.Errorf("a command of more than %d bytes", maxValue)
			}
			any = any || p.quoted || !p.variable
			if !p.variable || p.quoted {
				b.WriteString(text)
				continue
			}
			fields := strings.Fields(text)
			for i, f := range fields {
				if i > 0 {
					args = append(args, b.String())
					b.Reset()
				}
				b.WriteString(f)
				any = true
			}
		}
		if any || b.Len() > 0 {
			args = append(args, b.String())
		}
	}
	return args, nil
}

// run carries out commands, and returns whether the last one succeeded.
func (g *grub) run(list []command) (ok bool, err error) {
	ok = true
	for _, c := range list {
		if g.steps++; g.steps > maxSteps {
			return false, errGrubSteps
		}
		if c.tests != nil {
			ok, err = g.condition(c)
		} else {
			ok, err = g.one(c)
		}
		if err != nil {
			return ok, err
		}
		g.vars["?"] = map[bool]string{true: "0", false: "1"}[ok]
	}
	return ok, nil
}

func (g *grub) condition(c command) (bool, error) {
	for i, test := range c.tests {
		ok, err := g.run(test)
		if err != nil {
			return false, err
		}
		if ok {
			return g.run(c.thens[i])
		}
	}
	if len(c.thens) > len(c.tests) {
		return g.run(c.thens[len(c.tests)])
	}
	return true, nil
}

// call runs commands that belong to another place, within bounds.
func (g *grub) call(list []command) (bool, error) {
	if g.calls >= maxCalls {
		return false, fmt.Errorf("functions and files call each other more than %d deep", maxCalls)
	}
	g.calls++
	defer func() { g.calls-- }()
	ok, err := g.run(list)
	if errors.Is(err, errGrubReturn) {
		err = nil
	}
	return ok, err
}

// one carries out a command.
func (g *grub) one(c command) (bool, error) {
	args, err := g.expand(c.words)
	if err != nil || len(args) == 0 {
		return true, err
	}
	name, args := args[0], args[1:]
	if k, v, is := strings.Cut(name, "="); is && len(args) == 0 && isName(k) {
		g.set(k, v)
		return true, nil
	}
	if body, ok := g.functions[name]; ok {
		return g.function(body, args)
	}
	switch name {
	case "set":
		for _, a := range args {
			k, v, has := strings.Cut(a, "=")
			if has {
				g.set(k, v)
			}
		}
	case "unset":
		for _, a := range args {
			delete(g.vars, a)
		}
	case "function":
		if len(args) > 0 && len(g.functions) < 1024 {
			g.functions[args[0]] = c.block
		}
	case "menuentry", "submenu":
		return true, g.menu(name, args, c.block)
	case "[", "test":
		return g.test(args), nil
	case "search", "search.fs_uuid", "search.fs_label", "search.file":
		return g.search(name, args), nil
	case "load_env":
		return true, g.loadEnv(args)
	case "configfile", "source", ".", "normal", "extract_entries_configfile", "extract_entries_source":
		return g.file(args)
	case "linux", "linux16", "linuxefi":
		return g.linux(args), nil
	case "initrd", "initrd16", "initrdefi":
		if g.entry == nil {
			return false, nil
		}
		for _, a := range args {
			if !strings.HasPrefix(a, "-") && !strings.HasPrefix(a, "newc:") {
				g.entry.initrds = append(g.entry.initrds, g.ref(a))
			}
		}
	case "blscfg":
		return true, g.blscfg()
	case "return":
		return true, errGrubReturn
	case "false", "loadfont", "regexp", "background_image", "chainloader", "fwsetup", "cmp", "keystatus", "sleep", "smbios", "cpuid", "serial":
		return false, nil
	}
	// insmod, echo, export, terminal_output, save_env and all that changes nothing here.
	return true, nil
}

func (g *grub) set(name, value string) {
	if len(g.vars) < 4096 {
		g.vars[name] = value
	}
}

// isName says whether a word is a variable's name.
func isName(s string) bool {
	for i := range len(s) {
		if c := s[i]; c != '_' && !isLetter(c) && (i == 0 || !isDigit(c)) {
			return false
		}
	}
	return s != ""
}

// function calls a function of the configuration with its arguments.
func (g *grub) function(body []command, args []string) (bool, error) {
	was := make(map[string]string)
	for i := 0; i < 10; i++ {
		k := strconv.Itoa(i)
		was[k] = g.vars[k]
		delete(g.vars, k)
		if i > 0 && i <= len(args) {
			g.vars[k] = args[i-1]
		}
	}
	g.vars["#"] = strconv.Itoa(len(args))
	ok, err := g.call(body)
	for k, v := range was {
		g.vars[k] = v
	}
	return ok, err
}

// menu adds an entry or a submenu.
func (g *grub) menu(kind string, args []string, block []command) error {
	if g.n++; g.n > maxEntries {
		return nil
	}
	m := &menu{body: block, isSub: kind == "submenu"}
	var rest []string
	for i := 0; i < len(args); i++ {
		name, value, has := strings.Cut(args[i], "=")
		switch name {
		case "--class", "--users", "--hotkey", "--id":
			if !has && i+1 < len(args) {
				i++
				value = args[i]
			}
			if name == "--id" {
				m.id = value
			}
		case "--unrestricted":
		default:
			rest = append(rest, args[i])
		}
	}
	if len(rest) > 0 {
		m.title = rest[0]
	}
	m.vars = make(map[string]string, len(g.vars))
	for k, v := range g.vars {
		m.vars[k] = v
	}
	for i, a := range rest {
		if i < 9 {
			m.vars[strconv.Itoa(i+1)] = a
		}
	}
	if !m.isSub {
		g.entries = append(g.entries, m)
		return nil
	}
	outer, vars := g.entries, g.vars
	g.entries, g.vars = nil, m.vars
	_, err := g.call(block)
	m.sub = g.entries
	g.entries, g.vars = append(outer, m), vars
	return err
}

// linux notes the kernel of an entry and its command line.
func (g *grub) linux(args []string) bool {
	for len(args) > 0 && strings.HasPrefix(args[0], "-") {
		args = args[1:]
	}
	if g.entry == nil || len(args) == 0 {
		return false
	}
	g.entry.kernel = g.ref(args[0])
	g.entry.Cmdline = strings.Join(args[1:], " ")
	return g.entry.kernel.vol != nil
}

// ref is a file's name: (hd0,gpt1)/path, or a path in the root.
func (g *grub) ref(name string) ref {
	device := g.vars["root"]
	if strings.HasPrefix(name, "(") {
		if end := strings.IndexByte(name, ')'); end > 0 {
			device, name = name[1:end], name[end+1:]
		}
	}
	return ref{vol: g.s.device(device), path: path.Clean("/" + name)}
}

// exists says whether a name is a file's or a directory's.
func (g *grub) stat(name string) (size int64, isFile, isDir bool) {
	r := g.ref(name)
	if r.vol == nil {
		return 0, false, false
	}
	size, isFile = r.vol.isFile(r.path)
	return size, isFile, r.vol.isDir(r.path)
}

// search sets root, or another variable, to the device that has what is looked for.
func (g *grub) search(name string, args []string) bool {
	by, variable := "file", ""
	switch name {
	case "search.fs_uuid":
		by, variable = "uuid", "root"
	case "search.fs_label":
		by, variable = "label", "root"
	case "search.file":
		variable = "root"
	}
	var rest []string
	for i := 0; i < len(args); i++ {
		key, value, has := strings.Cut(args[i], "=")
		switch {
		case key == "--fs-uuid" || key == "-u":
			by = "uuid"
		case key == "--label" || key == "-l" || key == "--fs-label":
			by = "label"
		case key == "--file" || key == "-f":
			by = "file"
		case key == "--set" || key == "-s":
			if variable = "root"; has {
				variable = value
			}
		case strings.HasPrefix(key, "-"): // --no-floppy, --hint…
			if !has && (key == "--hint" || key == "-h") {
				i++
			}
		default:
			rest = append(rest, args[i])
		}
	}
	if len(rest) == 0 {
		return false
	}
	if name != "search" && len(rest) > 1 { // search.fs_uuid UUID VARIABLE
		variable = rest[1]
	}
	for _, v := range g.s.volumes {
		found := false
		switch by {
		case "uuid":
			found = v.uuid != "" && strings.EqualFold(v.uuid, rest[0])
		case "label":
			found = v.label != "" && v.label == rest[0]
		default:
			found = v.exists(rest[0])
		}
		if found {
			if variable != "" {
				g.vars[variable] = v.grub()
			}
			return true
		}
	}
	return false
}

// loadEnv reads variables that GRUB or its tools have saved.
func (g *grub) loadEnv(args []string) error {
	file := g.vars["prefix"] + "/grubenv"
	var only []string
	for i := 0; i < len(args); i++ {
		switch {
		case (args[i] == "-f" || args[i] == "--file") && i+1 < len(args):
			i++
			file = args[i]
		case strings.HasPrefix(args[i], "--file="):
			file = strings.TrimPrefix(args[i], "--file=")
		case strings.HasPrefix(args[i], "-"):
		default:
			only = append(only, args[i])
		}
	}
	r := g.ref(file)
	if r.vol == nil {
		return nil
	}
	for k, v := range grubEnv(r.vol, r.path) {
		wanted := len(only) == 0
		for _, o := range only {
			wanted = wanted || o == k
		}
		if wanted {
			g.vars[k] = v
		}
	}
	return nil
}

// grubEnv reads a file of variables.
func grubEnv(v *volume, file string) map[string]string {
	vars := make(map[string]string)
	text, ok := v.text(file)
	if !ok || !strings.HasPrefix(text, "# GRUB Environment Block") {
		return vars
	}
	for line := range strings.Lines(text) {
		if k, value, has := strings.Cut(strings.TrimSuffix(line, "\n"), "="); has && !strings.HasPrefix(k, "#") && len(vars) < 256 {
			vars[k] = strings.ReplaceAll(value, `\\`, `\`)
		}
	}
	return vars
}

// file reads another configuration.
func (g *grub) file(args []string) (bool, error) {
	if len(args) == 0 {
		return false, nil
	}
	r := g.ref(args[0])
	if r.vol == nil {
		return false, nil
	}
	text, ok := r.vol.text(r.path)
	if !ok {
		return false, nil
	}
	if g.steps += len(text) / 64; g.steps > maxSteps { // to read one again and again is work
		return false, errGrubSteps
	}
	list, err := parseGrub(text)
	if err != nil {
		return false, fmt.Errorf("%s: %w", r.path, err)
	}
	was := g.vars["config_directory"]
	defer func() { g.vars["config_directory"] = was }()
	g.vars["config_directory"] = "(" + r.vol.grub() + ")" + path.Dir(r.path)
	return g.call(list)
}

// blscfg adds the entries of the Boot Loader Specification, as Fedora's GRUB does: the
// newest first, with GRUB's variables in their options.
func (g *grub) blscfg() error {
	v := g.s.device(g.vars["root"])
	for _, r := range []ref{{v, "/loader/entries"}, {v, "/boot/loader/entries"}, g.ref(g.vars["prefix"] + "/../loader/entries")} {
		if r.vol == nil {
			continue
		}
		entries := g.s.blsEntries(r.vol, r.path, g.vars)
		sortByID(entries)
		for _, e := range entries {
			if g.n++; g.n > maxEntries {
				return nil
			}
			g.entries = append(g.entries, &menu{title: e.Title, id: e.ID, bls: e})
		}
		if len(entries) > 0 {
			return nil
		}
	}
	return nil
}
