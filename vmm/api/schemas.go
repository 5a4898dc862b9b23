package api

import (
	"path"
	"reflect"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/machine"
)

// newRegistry makes the registry of the document's schemas, which knows what the JSON of
// types with a MarshalJSON of their own looks like.
func newRegistry() huma.Registry {
	r := huma.NewMapRegistry("#/components/schemas/", schemaName)
	r.RegisterTypeAlias(reflect.TypeFor[time.Duration](), reflect.TypeFor[milliseconds]())
	r.RegisterTypeAlias(reflect.TypeFor[vmm.Devices](), devicesForm())
	r.RegisterTypeAlias(reflect.TypeFor[vmm.State](), reflect.TypeFor[stateSchema]())
	return r
}

// schemaName names the schema of a type: those of this package and of those whose names are
// unique as they are called, others with their package's name before it.
func schemaName(t reflect.Type, hint string) string {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	name := huma.DefaultSchemaNamer(t, hint)
	switch pkg := path.Base(t.PkgPath()); pkg {
	case ".", "", "api", "report":
		return name
	case "vmm":
		if name == "Event" { // this package has one too
			return "VMEvent"
		}
		return name
	case "v2":
		if name == "ErrorModel" {
			return "Problem"
		}
		return name
	default:
		return strings.ToUpper(pkg[:1]) + pkg[1:] + name
	}
}

// milliseconds is how the types of package report write a duration.
type milliseconds float64

// Schema implements [huma.SchemaProvider].
func (milliseconds) Schema(huma.Registry) *huma.Schema {
	return &huma.Schema{Type: huma.TypeNumber, Format: "double", Description: "milliseconds"}
}

// Schema implements [huma.SchemaProvider].
func (Duration) Schema(huma.Registry) *huma.Schema {
	return &huma.Schema{Type: huma.TypeString, Description: "a duration, as in 300ms, 1m30s or 1h", Examples: []any{"300ms"}}
}

// states are all states of a VM.
var states = []vmm.State{vmm.StateRunning, vmm.StatePaused, vmm.StateReceiving, vmm.StatePanicked, vmm.StateMigrating, vmm.StateMigrated, vmm.StateHandoffUnknown, vmm.StateStopped}

type stateSchema string

// Schema implements [huma.SchemaProvider].
func (stateSchema) Schema(huma.Registry) *huma.Schema {
	s := &huma.Schema{Type: huma.TypeString}
	for _, state := range states {
		s.Enum = append(s.Enum, string(state))
	}
	return s
}

// devicesForm is a struct with the fields that the JSON of [vmm.Devices] has.
func devicesForm() reflect.Type {
	var fields []reflect.StructField
	for _, k := range machine.Kinds() {
		t := reflect.TypeFor[bool]()
		name := k.Name
		if k.NewInfo != nil {
			t = reflect.TypeOf(k.NewInfo())
		}
		if k.Max != 1 {
			name, t = name+"s", reflect.SliceOf(t)
		}
		fields = append(fields, reflect.StructField{
			Name: strings.ToUpper(name[:1]) + name[1:], Type: t, Tag: reflect.StructTag(`json:"` + name + `,omitempty"`),
		})
	}
	return reflect.StructOf(fields)
}

// openAnswers lets answers have fields that a later version adds: only requests have no others
// than those that are listed.
func openAnswers(doc *huma.OpenAPI) {
	asked := map[*huma.Schema]bool{}
	var walk func(*huma.Schema)
	walk = func(s *huma.Schema) {
		if s == nil || asked[s] {
			return
		}
		asked[s] = true
		walk(doc.Components.Schemas.SchemaFromRef(s.Ref))
		walk(s.Items)
		for _, p := range s.Properties {
			walk(p)
		}
	}
	for _, route := range doc.Paths {
		for _, op := range []*huma.Operation{route.Get, route.Post, route.Put, route.Delete} {
			if op == nil {
				continue
			}
			delete(op.Responses, "422") // see invalidWriter
			if op.RequestBody == nil {
				continue
			}
			for _, media := range op.RequestBody.Content {
				walk(media.Schema)
			}
		}
	}
	for name, s := range doc.Components.Schemas.Map() {
		if !asked[s] {
			s.AdditionalProperties = nil
		}
		if name == "Problem" {
			for _, p := range s.Properties {
				p.Examples = nil
			}
		}
	}
}
