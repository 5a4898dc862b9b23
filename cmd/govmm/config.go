package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/machine"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
)

// configFlags are the flags of govmm config.
type configFlags struct {
	from    string
	receive bool
	schema  bool
	json    bool
}

func newConfig() *cobra.Command {
	var f configFlags
	cmd := &cobra.Command{
		Use:   "config FILE | --from NAME | --schema",
		Short: "Check a file for run --config, and print what it says with all defaults",
		Long: `Check a file for govmm run --config, and print what it says with all defaults.

With --from it prints the configuration of a VM that runs, from which run --config
starts another like it. With --schema it prints a JSON Schema, by which editors
complete and check such files. With --receive all is about govmm receive --config.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case f.schema && (f.from != "" || len(args) > 0), f.from != "" && len(args) > 0, !f.schema && f.from == "" && len(args) == 0:
				return usagef(cmd, "expected a FILE, --from NAME or --schema")
			case f.schema:
				return f.print(cmd.OutOrStdout(), schemaOf(f.command()), true)
			case f.from != "":
				return f.printFrom(cmd)
			}
			return f.check(cmd, args[0])
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&f.from, "from", "", "print the configuration of the VM `NAME`, which runs")
	flags.BoolVar(&f.receive, "receive", false, "the file is for govmm receive")
	flags.BoolVar(&f.schema, "schema", false, "print the JSON Schema of such files")
	flags.BoolVar(&f.json, "json", false, "print JSON instead of YAML")
	return cmd
}

// command is the command that a file is for.
func (f *configFlags) command() *cobra.Command {
	if f.receive {
		return newReceive()
	}
	return newRun()
}

// check reads a file as the command would, and prints all that it then has.
func (f *configFlags) check(cmd *cobra.Command, path string) error {
	of := f.command()
	err := of.Flags().Set("config", path)
	if err == nil {
		err = of.PreRunE(of, nil)
	}
	if err != nil {
		return usagef(cmd, "%v", err)
	}
	doc := sayAll(of.Flags())
	if c, err := readConfig(f.command(), path); err == nil && c.name != "" {
		doc = append(document{{"name", c.name}}, doc...)
	}
	return f.print(cmd.OutOrStdout(), doc, f.json)
}

// printFrom prints the configuration of a VM that runs.
func (f *configFlags) printFrom(cmd *cobra.Command) error {
	clients := guestFlags()
	c, err := clients.client(cmd.Context(), []string{f.from})
	var config map[string]any
	if err == nil {
		config, err = c.Config(cmd.Context())
		err = advise(err)
	}
	if err != nil {
		return fmt.Errorf("config --from %s: %w", f.from, err)
	}
	var doc document
	for _, key := range slices.Sorted(maps.Keys(config)) {
		doc = append(doc, entry{key, config[key]})
	}
	return f.print(cmd.OutOrStdout(), doc, f.json)
}

// configuration is what run --config takes to start such a VM. Of a guest that has come
// from another host, its kernel is not known here.
func (p *process) configuration(vm *vmm.VM) map[string]any {
	config := map[string]any{"name": p.claim.Name()}
	runs := newRun().Flags()
	for _, e := range sayAll(p.cmd.Flags()) {
		if runs.Lookup(e.key) != nil {
			config[e.key] = e.value
		}
	}
	spec, ok := vm.Spec()
	if p.cmd.Name() != "receive" || !ok {
		return config
	}
	config["cpus"], config["memory"], config["memory-backing"] = spec.CPUs, formatSize(spec.Memory), string(spec.Backing)
	if spec.Cmdline != "" {
		config["cmdline"] = spec.Cmdline
	}
	for _, k := range machine.Kinds() {
		delete(config, k.Name)
		if k.Parse == nil && k.Usage != "" {
			config[k.Name] = false // its default may be true
		}
		for _, d := range spec.Devices {
			if d.Kind() != k.Name {
				continue
			}
			words, ok := d.(virtio.Worded)
			switch list, _ := config[k.Name].([]string); {
			case !ok:
				config[k.Name] = true
			case k.Max == 1:
				config[k.Name] = words.Words()
			default:
				config[k.Name] = append(list, words.Words())
			}
		}
	}
	return config
}

// entry is one key of a document, and document is keys in an order.
type (
	entry struct {
		key   string
		value any
	}
	document []entry
)

// MarshalJSON implements [json.Marshaler].
func (d document) MarshalJSON() ([]byte, error) {
	var b strings.Builder
	for i, e := range d {
		value, err := json.Marshal(e.value)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&b, "%s%q:%s", map[bool]string{true: "{", false: ","}[i == 0], e.key, value)
	}
	if len(d) == 0 {
		b.WriteByte('{')
	}
	return []byte(b.String() + "}"), nil
}

// MarshalYAML implements [yaml.Marshaler].
func (d document) MarshalYAML() (any, error) {
	n := &yaml.Node{Kind: yaml.MappingNode}
	for _, e := range d {
		var value yaml.Node
		if err := value.Encode(e.value); err != nil {
			return nil, err
		}
		n.Content = append(n.Content, &yaml.Node{Kind: yaml.ScalarNode, Value: e.key}, &value)
	}
	return n, nil
}

func (f *configFlags) print(out io.Writer, v any, asJSON bool) error {
	if asJSON {
		enc := json.NewEncoder(out)
		enc.SetEscapeHTML(false)
		enc.SetIndent("", "  ")
		return enc.Encode(v)
	}
	enc := yaml.NewEncoder(out)
	enc.SetIndent(2)
	if err := enc.Encode(v); err != nil {
		return err
	}
	return enc.Close()
}

// sayAll is what the flags say, with their defaults, as a file can say it. What is empty
// by default and was not given is left out.
func sayAll(flags *pflag.FlagSet) (doc document) {
	flags.VisitAll(func(flag *pflag.Flag) {
		if flag.Hidden || slices.Contains(notInFile, flag.Name) {
			return
		}
		if v := flagValue(flag); v != nil {
			doc = append(doc, entry{flag.Name, v})
		}
	})
	return doc
}

// flagValue is the value of a flag, nil if there is none.
func flagValue(flag *pflag.Flag) any {
	s := flag.Value.String()
	switch list, many := flag.Value.(pflag.SliceValue); {
	case many && len(list.GetSlice()) == 0, !many && s == "":
		return nil
	case many:
		return list.GetSlice()
	}
	switch flag.Value.Type() {
	case "bool":
		return s == "true"
	case "int", "uint":
		if n, err := strconv.Atoi(s); err == nil {
			return n
		}
	}
	return s
}

// schemaOf is the JSON Schema of a command's file.
func schemaOf(cmd *cobra.Command) document {
	properties := document{{"name", document{{"type", "string"}, {"description", "name of the VM"}}}}
	here := cmd.Name() == "receive"
	cmd.Flags().VisitAll(func(flag *pflag.Flag) {
		if flag.Hidden || slices.Contains(notInFile, flag.Name) {
			return
		}
		properties = append(properties, entry{flag.Name, schemaOfFlag(flag, here)})
	})
	return document{
		{"$schema", "https://json-schema.org/draft/2020-12/schema"},
		{"title", "govmm " + cmd.Name() + " --config"},
		{"type", "object"},
		{"additionalProperties", false},
		{"properties", properties},
	}
}

var scalars = []string{"string", "number", "boolean"}

// schemaOfFlag is the schema of one flag's value. here says that the host's side of devices
// is given.
func schemaOfFlag(flag *pflag.Flag, here bool) document {
	usage := strings.ReplaceAll(flag.Usage, "`", "")
	doc := document{{"description", usage}}
	one := document{{"type", scalars}}
	if words := deviceWords(flag.Name, here); words != nil {
		one = document{{"type", append([]string{"object"}, scalars...)}, {"additionalProperties", false}, {"properties", words}}
	}
	if _, many := flag.Value.(pflag.SliceValue); many {
		choices := []any{document{{"type", "array"}, {"items", one}}, one}
		if deviceWords(flag.Name, here) != nil {
			choices = append(choices, document{{"type", "object"}, {"additionalProperties", document{{"type", "object"}}}})
		}
		return append(doc, entry{"anyOf", choices})
	}
	switch flag.Value.Type() {
	case "bool":
		return append(doc, entry{"type", "boolean"}, entry{"default", flag.DefValue == "true"})
	case "int", "uint":
		doc = append(doc, entry{"type", "integer"})
	default:
		doc = append(doc, one...)
	}
	if v := flagValue(flag); v != nil {
		doc = append(doc, entry{"default", v})
	}
	return doc
}

var usageWord = regexp.MustCompile(`([a-z][a-z0-9-]*)(=?)`)

// deviceWords are the words of a device's flag, from its usage: path=FILE[,readonly].
func deviceWords(name string, here bool) (words document) {
	for _, k := range machine.Kinds() {
		if k.Name != name || k.Parse == nil {
			continue
		}
		usage := k.Usage
		if here {
			usage = k.HereUsage
		}
		_, usage, _ = strings.Cut(usage, ": ")
		usage, _, _ = strings.Cut(usage, " (")
		for _, part := range strings.FieldsFunc(usage, func(r rune) bool { return strings.ContainsRune("[],|.… ", r) }) {
			m := usageWord.FindStringSubmatch(part)
			if m == nil || !strings.HasPrefix(part, m[0]) || slices.ContainsFunc(words, func(e entry) bool { return e.key == m[1] }) {
				continue
			}
			is := document{{"type", "boolean"}}
			if m[2] == "=" {
				is = document{{"type", append([]string{"array"}, scalars...)}}
			}
			words = append(words, entry{m[1], is})
		}
	}
	return words
}
