package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
)

// maxConfigFile bounds a configuration file, in bytes.
const maxConfigFile = 1 << 20

// configFile is a file that says what flags can say, under the same names: what a flag of
// the command line says wins. docs/config.md describes it.
type configFile struct {
	path  string
	name  string         // of the VM; "": the file has none
	lines map[string]int // where each key is that was used
	items []configItem   // values of flags that may be given several times
	flags *pflag.FlagSet
}

// configItem is one value of a flag, and where it is.
type configItem struct {
	value string
	line  int
}

// notInFile are flags that a file cannot say.
var notInFile = []string{"config", "help"}

// readConfig sets the flags of a command that the command line has not set from the file at
// path. An error names the line.
func readConfig(cmd *cobra.Command, path string) (*configFile, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("--config: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxConfigFile+1))
	if err != nil {
		return nil, fmt.Errorf("--config: %w", err)
	}
	if len(text) > maxConfigFile {
		return nil, fmt.Errorf("--config %s: it is larger than %d bytes", path, maxConfigFile)
	}
	c := &configFile{path: path, lines: map[string]int{}, flags: cmd.Flags()}
	return c, c.apply(text)
}

// at is an error at a line of the file.
func (c *configFile) at(line int, format string, args ...any) error {
	return fmt.Errorf("%s:%d: %w", c.path, line, fmt.Errorf(format, args...))
}

var yamlLine = regexp.MustCompile(`^yaml: line (\d+): `)

// apply sets flags from the text of the file.
func (c *configFile) apply(text []byte) error {
	var doc, more yaml.Node
	documents := yaml.NewDecoder(bytes.NewReader(text))
	err := documents.Decode(&doc)
	if err == nil {
		if err = documents.Decode(&more); err == nil {
			return c.at(more.Line, "a second document, after a line ---; expected one")
		}
	}
	if err != nil && err != io.EOF { // EOF: no document, or no other
		msg, line := err.Error(), 1
		if m := yamlLine.FindStringSubmatch(msg); m != nil {
			line, _ = strconv.Atoi(m[1])
			msg = strings.TrimPrefix(msg, m[0])
		}
		return c.at(line, "%s", strings.ReplaceAll(strings.TrimPrefix(msg, "yaml: "), "\n", " "))
	}
	if len(doc.Content) == 0 {
		return nil // an empty file
	}
	top := doc.Content[0]
	if top.Kind != yaml.MappingNode {
		return c.at(top.Line, "expected keys and values, such as memory: 1G")
	}
	return c.eachKey(top, func(key string, line int, value *yaml.Node) error {
		if key == "name" {
			s, err := c.scalar(key, value)
			c.name = s
			return err
		}
		flag := c.flags.Lookup(key)
		if flag == nil || flag.Hidden || slices.Contains(notInFile, key) {
			return c.at(line, "unknown key %.80q%s", key, c.suggest(key))
		}
		given := flag.Changed
		if err := c.set(flag, value, given); err != nil {
			return err
		}
		if !given {
			c.lines[key] = line
		}
		return nil
	})
}

// eachKey calls f for each key of a mapping, each of which must be there once.
func (c *configFile) eachKey(m *yaml.Node, f func(key string, line int, value *yaml.Node) error) error {
	seen := map[string]int{}
	for i := 0; i+1 < len(m.Content); i += 2 {
		k, v := m.Content[i], m.Content[i+1]
		if k.Kind != yaml.ScalarNode || k.Tag == "!!merge" {
			return c.at(k.Line, "a key must be a word")
		}
		if first, ok := seen[k.Value]; ok {
			return c.at(k.Line, "%q is given twice, first at line %d", k.Value, first)
		}
		seen[k.Value] = k.Line
		if err := f(k.Value, k.Line, c.resolve(v)); err != nil {
			return err
		}
	}
	return nil
}

// resolve follows an alias (*name) to what it stands for, once: a longer way is not needed.
func (c *configFile) resolve(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

// suggest names the keys that look like one that is unknown.
func (c *configFile) suggest(key string) string {
	near := &cobra.Command{Use: "config", SuggestionsMinimumDistance: 2}
	c.flags.VisitAll(func(f *pflag.Flag) {
		if !f.Hidden && !slices.Contains(notInFile, f.Name) {
			near.AddCommand(&cobra.Command{Use: f.Name, Run: func(*cobra.Command, []string) {}})
		}
	})
	if like := near.SuggestionsFor(key); len(like) > 0 {
		return "; did you mean " + strings.Join(like, " or ") + "?"
	}
	return "; govmm config --schema lists all"
}

// set sets a flag, unless the command line has given it: then the value is only checked for
// what it is.
func (c *configFile) set(flag *pflag.Flag, value *yaml.Node, given bool) error {
	list, many := flag.Value.(pflag.SliceValue)
	if !many {
		s, err := c.scalar(flag.Name, value)
		if value.Kind == yaml.MappingNode { // a device of which there is one
			s, err = c.words(flag.Name, value, "")
		}
		if err != nil || given || s == flag.DefValue {
			return err
		}
		if err := flag.Value.Set(s); err != nil {
			return c.at(value.Line, "%s: %w", flag.Name, err)
		}
		flag.Changed = true
		return nil
	}
	items, err := c.list(flag.Name, value)
	if err != nil || given || len(items) == 0 {
		return err
	}
	c.items = append(c.items, items...)
	var values []string
	for _, item := range items {
		values = append(values, item.value)
	}
	if err := list.Replace(values); err != nil {
		return c.at(value.Line, "%s: %w", flag.Name, err)
	}
	flag.Changed = true
	return nil
}

// list reads the values of a flag that may be given several times: one, a list of them, or
// a mapping whose keys are the names of a guest's devices.
func (c *configFile) list(key string, value *yaml.Node) (items []configItem, err error) {
	add := func(n *yaml.Node, device string) error {
		s, err := c.words(key, n, device)
		items = append(items, configItem{s, n.Line})
		return err
	}
	switch {
	case value.Kind == yaml.SequenceNode:
		for _, n := range value.Content {
			if err := add(c.resolve(n), ""); err != nil {
				return nil, err
			}
		}
		return items, nil
	case value.Kind == yaml.MappingNode && byName(value):
		err := c.eachKey(value, func(device string, _ int, n *yaml.Node) error { return add(n, device) })
		return items, err
	case value.Tag == "!!null":
		return nil, nil
	}
	return items, add(value, "")
}

// byName reports whether all values of a mapping are mappings, so that its keys are names.
func byName(m *yaml.Node) bool {
	for i := 1; i < len(m.Content); i += 2 {
		if m.Content[i].Kind != yaml.MappingNode {
			return false
		}
	}
	return len(m.Content) > 0
}

// leading are the words that come first where their order matters.
var leading = []string{"path", "tap", "user", "socket", "macvtap"}

// words makes the words of a flag from a scalar, or from a mapping such as {path: a.img,
// readonly: true}. device is the name of the guest's device that they are for.
func (c *configFile) words(key string, value *yaml.Node, device string) (string, error) {
	if value.Kind != yaml.MappingNode {
		return c.scalar(key, value)
	}
	var first, rest []string
	err := c.eachKey(value, func(word string, line int, n *yaml.Node) error {
		add := func(s string) {
			if slices.Contains(leading, word) && first == nil {
				first = append(first, s)
				return
			}
			rest = append(rest, s)
		}
		values := []*yaml.Node{n}
		if n.Kind == yaml.SequenceNode {
			values = n.Content
		}
		for _, n := range values {
			n = c.resolve(n)
			s, err := c.scalar(key+": "+word, n)
			switch {
			case err != nil:
				return err
			case n.Tag == "!!bool" && s == "true":
				add(word)
			case n.Tag == "!!bool":
			default:
				add(word + "=" + strings.ReplaceAll(s, ",", ",,"))
			}
		}
		return nil
	})
	if device != "" {
		name := "for="
		if key == "net" { // a network device is known by its address
			name = "mac="
		}
		rest = append(rest, name+strings.ReplaceAll(device, ",", ",,"))
	}
	return strings.Join(append(first, rest...), ","), err
}

// scalar reads one value.
func (c *configFile) scalar(key string, value *yaml.Node) (string, error) {
	if value.Kind != yaml.ScalarNode {
		return "", c.at(value.Line, "%s: expected one value", key)
	}
	if value.Tag == "!!bool" {
		b, err := strconv.ParseBool(strings.ToLower(value.Value))
		if err != nil { // yes and on are booleans of old YAML
			return "", c.at(value.Line, "%s: %s: expected true or false", key, value.Value)
		}
		return strconv.FormatBool(b), nil
	}
	if value.Tag == "!!null" {
		return "", nil
	}
	return value.Value, nil
}

// explain adds to an error about flags the lines where the file says them.
func (c *configFile) explain(err error) error {
	if c == nil || err == nil {
		return err
	}
	msg := err.Error()
	var where []string
	for _, item := range c.items {
		if item.value != "" && strings.Contains(msg, strconv.Quote(item.value)) {
			where = append(where, fmt.Sprintf("%s:%d", c.path, item.line))
		}
	}
	if where == nil {
		for key, line := range c.lines {
			if regexp.MustCompile(`--` + regexp.QuoteMeta(key) + `\b[^-]`).MatchString(msg + " ") {
				where = append(where, fmt.Sprintf("%s:%d", c.path, line))
			}
		}
	}
	if where == nil {
		return err
	}
	slices.Sort(where)
	msg = fmt.Sprintf("%s (%s)", msg, strings.Join(where, ", "))
	if usage := (*usageError)(nil); errors.As(err, &usage) {
		return &usageError{msg}
	}
	return &explainedError{msg, err}
}

// explainedError is an error with the lines of a file.
type explainedError struct {
	msg string
	err error
}

func (e *explainedError) Error() string { return e.msg }
func (e *explainedError) Unwrap() error { return e.err }
